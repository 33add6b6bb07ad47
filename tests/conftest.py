"""Settings for all tests: no network, one seed, one thread (the models are tiny)."""

import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where corpora are kept, also by the processes that tests start.
os.environ.setdefault("HF_DATASETS_CACHE", f"{tempfile.gettempdir()}/hf_lamb_tests_{os.getpid()}")

from pathlib import Path

import pytest
import torch

from hf_lamb import optim_args, registration

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which torch has not done yet


def pytest_sessionfinish() -> None:
    """Leave no corpus behind."""
    shutil.rmtree(f"{tempfile.gettempdir()}/hf_lamb_tests_{os.getpid()}", ignore_errors=True)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Every test has the same random numbers, and hears what is said once."""
    torch.manual_seed(0)
    registration.warn_once.cache_clear()
    optim_args.warn_once.cache_clear()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four documents of the embedded corpus, some 20,000 words."""
    from recipes.lib.corpus import load_documents

    folder = tmp_path_factory.mktemp("texts")
    for document in load_documents("embedded")[40:44]:
        (folder / f"{document.name}.txt").write_text(document.text[:30_000])
    return folder


@pytest.fixture(scope="session")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of an uninterrupted run of the pretraining recipe: 8 steps, saved at step 4."""
    from tests.helpers import SMALL, pretrain

    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretrain(monkeypatch, *SMALL, "--corpus", str(texts), "--output_dir", str(output), "--save_steps", "4")
    return output
