"""Protects what is shipped and what importing it costs."""

import re
import subprocess
import sys
import tomllib
import zipfile
from datetime import date
from pathlib import Path

import pytest
from packaging.version import Version

import hf_lamb
from tests.scripts import release

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks."""
    source = tmp_path_factory.mktemp("source")
    for name in TRACKED:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def dist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it."""
    dist = tmp_path_factory.mktemp("dist")
    release.build(source, dist)
    return dist


def test_the_wheel_holds_hf_lamb_and_nothing_else(dist: Path) -> None:
    """No recipes, no tests in site-packages; every module and py.typed are there."""
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"hf_lamb-{hf_lamb.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(metadata)} == {
        name for name in TRACKED if name.startswith("hf_lamb/")
    }
    assert metadata + "licenses/LICENSE" in names
    assert b"hf-lamb = hf_lamb.__main__:main" in zipfile.ZipFile(wheel).read(metadata + "entry_points.txt")


def test_the_sdists_tests_run_with_the_wheel(dist: Path) -> None:
    """Those against golden numbers; `make release` runs all of them."""
    release.test_built(dist, ["--numprocesses", "0", "tests/test_lamb_reference.py", "-k", "golden"])
    with pytest.raises(subprocess.CalledProcessError):
        release.test_built(dist, ["--numprocesses", "0", "tests/test_lamb_reference.py", "-k", "no_test_of_this_name"])


def test_a_release_writes_its_version_everywhere_or_nowhere(source: Path) -> None:
    """The changelog's newest section, the citation and the package; a second release needs a new section."""
    files = [source / name for name in ("CHANGELOG.md", "CITATION.cff", "hf_lamb/_version.py")]
    before = [file.read_text() for file in files]
    with pytest.raises(ValueError, match=r"the version 1\.2 is not of the form 1\.2\.3"):
        release.write_version(source, "1.2", date(2027, 1, 2))
    release.write_version(source, "1.2.3", date(2027, 1, 2))
    changelog, citation, version = (file.read_text() for file in files)
    assert "\n## 1.2.3 (2027-01-02)\n" in changelog
    assert "\nversion: 1.2.3\ndate-released: 2027-01-02\n" in citation
    assert version.endswith('__version__ = "1.2.3"\n')
    with pytest.raises(ValueError, match=r"CHANGELOG\.md: expected one line like .*unreleased"):
        release.write_version(source, "1.2.4", date(2027, 1, 3))
    assert [file.read_text() for file in files] == [changelog, citation, version]
    for file, text in zip(files, before, strict=True):
        file.write_text(text)


def test_the_floors_that_are_tested_are_those_of_the_metadata() -> None:
    """.github/workflows/ci.yml tests with the lowest versions that an installation may have."""
    floors = (ROOT / ".github/floors.txt").read_text().splitlines()[1:]
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [Version(line.partition("==")[2]) for line in floors] == [
        Version(requirement.partition(">=")[2].partition(",")[0]) for requirement in needed
    ]
    assert [line.partition("==")[0] for line in floors] == [need.partition(">=")[0] for need in needed]


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after a statement, in a fresh interpreter."""
    script = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_hf_lamb_alone_loads_nothing_else() -> None:
    """`hf-lamb --help` does not wait for torch."""
    assert {name for name in loaded_by("import hf_lamb") if name not in sys.stdlib_module_names} <= {
        "hf_lamb",
        *loaded_by("pass"),
    }


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


def test_no_text_installs_hf_lamb_from_pypi() -> None:
    """It is not there: a message names a package that is, or an extra of the clone: `.[recipes]`."""
    texts = {name: (ROOT / name).read_text() for name in TRACKED if name.endswith((".py", ".md", ".yaml", ".yml"))}
    assert texts
    assert [name for name, text in texts.items() if re.search(r"pip install '?hf_lamb\b", text)] == []
