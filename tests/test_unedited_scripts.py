"""Protects `--optim lamb` in scripts as their authors ship them: transformers' run_mlm.py and run_glue.py, trl's SFT.

They run where they are at hand: `TRANSFORMERS_EXAMPLES=.../transformers/examples/pytorch`, and trl installed.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hf_lamb
from recipes.lib.tokenizer import train_tokenizer

ROOT = Path(hf_lamb.__file__).parents[1]
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SIZES = {**WIDTHS, "vocab_size": 400, "max_position_embeddings": 64}
OPTIONS = (
    "--optim lamb --optim_args max_trust_ratio=10,beta2=0.99 --learning_rate 1e-2 --weight_decay 0.01 --use_cpu "
    "--max_steps 4 --save_steps 4 --logging_steps 2 --report_to none --output_dir out"
)
# What `evaluate.load("accuracy")` finds before it would ask the hub.
ACCURACY = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(predictions)}
"""

STOCK, LAMBS = (), ("--trainer", "lamb")
each_trainer = pytest.mark.parametrize("trainer", [STOCK, LAMBS], ids=["Trainer", "LambTrainer"])
each_number_of_processes = pytest.mark.parametrize("processes", [1, 2])


@pytest.fixture
def folder(texts: Path, tmp_path: Path) -> Path:
    """A working directory with all that the scripts would otherwise get from the hub."""
    documents = [path.read_text() for path in sorted(texts.iterdir())]
    sentences = [[line for line in text.splitlines() if line][:40] for text in documents]
    for name, chosen in {"train": sentences[:2], "validation": sentences[2:]}.items():
        rows = [(line, label) for label, lines in enumerate(chosen) for line in lines]
        (tmp_path / f"{name}.txt").write_text("\n".join(line for line, _ in rows))
        objects = [json.dumps({"sentence": line, "label": label}) for line, label in rows]
        (tmp_path / f"{name}.json").write_text("\n".join(objects))
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose/train.jsonl").write_text("\n".join(json.dumps({"text": text[:2000]}) for text in documents * 8))
    (tmp_path / "accuracy").mkdir()
    (tmp_path / "accuracy/accuracy.py").write_text(ACCURACY)

    tokenizer = train_tokenizer(documents, SIZES["vocab_size"])
    tokenizer.eos_token = tokenizer.sep_token
    bert, llama = BertForSequenceClassification(BertConfig(**SIZES)), LlamaForCausalLM(LlamaConfig(**SIZES))
    for name, model in {"bert": bert, "llama": llama}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def example(name: str) -> Path:
    """One of transformers' example scripts; skips where there are none, or not what they import."""
    examples = os.environ.get("TRANSFORMERS_EXAMPLES")
    if not examples:
        pytest.skip("TRANSFORMERS_EXAMPLES does not name a copy of transformers' folder examples/pytorch")
    for package in ("datasets", "evaluate"):
        pytest.importorskip(package)
    return Path(examples, name)


def train(folder: Path, processes: int, *arguments: object, trainer: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Run in `folder` and see that it was LAMB that trained: the last line of the trainer's log, and all output."""
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split() if processes > 1 else []
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "hf_lamb.run", *trainer, *map(str, arguments), *OPTIONS.split()],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    groups = torch.load(folder / "out/checkpoint-4/optimizer.pt", weights_only=True)["param_groups"]
    assert {group["layer_adaptation"] for group in groups} == {True, False}
    assert {(group["max_trust_ratio"], group["betas"], group["eps"]) for group in groups} == {(10, (0.9, 0.99), 1e-6)}
    state = json.loads((folder / "out/checkpoint-4/trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert math.isfinite(state["log_history"][-1]["loss"])
    return state["log_history"][-1], done.stdout + done.stderr


@pytest.mark.slow
@each_trainer
@each_number_of_processes
def test_run_mlm(folder: Path, processes: int, trainer: Sequence[str]) -> None:
    """With worker processes that load the data, and accumulation: one warning names what Trainer does to the loss.

    LambTrainer does not do it, and there is no warning.
    """
    overrides = ",".join(f"{key}={value}" for key, value in SIZES.items())
    data = "--train_file train.txt --validation_file validation.txt --max_seq_length 64 --dataloader_num_workers 2"
    model = f"--model_type bert --config_overrides {overrides} --tokenizer_name bert --gradient_accumulation_steps 2"
    script = example("language-modeling/run_mlm.py")
    options = ["--do_train", "--do_eval", *data.split(), *model.split()]
    log, output = train(folder, processes, script, *options, trainer=trainer)
    warned = output.count("BertForMaskedLM.accepts_loss_kwargs = False")
    splits = 2 * processes if trainer == STOCK else 1
    assert warned == (trainer == STOCK)
    assert not warned or f"multiplies its loss and gradient by {splits} " in output
    assert log["loss"] == pytest.approx(splits * math.log(SIZES["vocab_size"]), rel=0.2)
    results = json.loads((folder / "out/all_results.json").read_text())
    assert math.isfinite(results["eval_loss"])
    assert 0 <= results["eval_accuracy"] <= 1


@pytest.mark.slow
@each_number_of_processes
def test_run_glue(folder: Path, processes: int) -> None:
    """The head on top of a saved model: it has parameters that neither decay nor adapt, too."""
    data = "--train_file train.json --validation_file validation.json --max_seq_length 64 --model_name_or_path bert"
    train(folder, processes, example("text-classification/run_glue.py"), "--do_train", "--do_eval", *data.split())
    results = json.loads((folder / "out/all_results.json").read_text())
    assert math.isfinite(results["eval_loss"])
    assert 0 <= results["eval_accuracy"] <= 1


@pytest.mark.slow
@each_trainer
def test_trl_sft(folder: Path, trainer: Sequence[str]) -> None:
    """A module of a package, with `TrainingArguments` and a Trainer of its own.

    On one process: on two, with gloo, it may hang at its very end under any optimizer and launcher, because it
    destroys the process group while it holds the GIL (https://github.com/pytorch/pytorch/issues/56297).
    """
    pytest.importorskip("trl")
    options = "--model_name_or_path llama --dataset_name prose --max_length 64"
    log, _ = train(folder, 1, "-m", "trl.scripts.sft", *options.split(), trainer=trainer)
    assert log["loss"] == pytest.approx(math.log(SIZES["vocab_size"]), rel=0.2)
