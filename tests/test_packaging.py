"""Protects what is shipped and what importing it costs."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import hf_lamb

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_hf_lamb_and_nothing_else(tmp_path: Path) -> None:
    """No recipes, no tests in site-packages; every module and py.typed are there."""
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if name.startswith(("hf_lamb/", "recipes/", "tests/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"hf_lamb-{hf_lamb.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(metadata)} == {
        name for name in tracked if name.startswith("hf_lamb/")
    }
    assert metadata + "licenses/LICENSE" in names


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after a statement, in a fresh interpreter."""
    script = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_hf_lamb_loads_torch_and_little_else() -> None:
    """`from hf_lamb import Lamb` serves people without transformers; it must not cost its import either."""
    more = loaded_by("import torch, hf_lamb; hf_lamb.Lamb; hf_lamb.lamb_param_groups") - loaded_by("import torch")
    assert {name for name in more if name not in sys.stdlib_module_names} == {"hf_lamb"}


def test_the_optimizers_own_tests_need_no_transformers() -> None:
    """Those against the reference and published numbers run, conftest.py included, where it is not installed."""
    script = "import sys; sys.modules['transformers'] = sys.modules['accelerate'] = None; import pytest; "
    script += "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/test_lamb_reference.py', '-k', 'golden']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_names_that_need_transformers_import_it_when_touched() -> None:
    assert "transformers" in loaded_by("import hf_lamb; hf_lamb.LambTrainer")
    assert "LambTrainer" in dir(hf_lamb)
    with pytest.raises(AttributeError, match="has no attribute 'LarsTrainer'"):
        hf_lamb.LarsTrainer  # noqa: B018


def test_recipes_import_datasets_and_evaluate_only_where_used() -> None:
    """The recipe runs on the embedded text without them."""
    script = "import sys; sys.modules['datasets'] = sys.modules['evaluate'] = None; import recipes.pretrain_bert"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_no_exact_pins_outside_constraints() -> None:
    """`torch==` in the metadata would replace users' torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [project["dependencies"], *project["optional-dependencies"].values()]
    assert not [r for listed in requirements for r in listed if "==" in r.partition(";")[0]]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()
