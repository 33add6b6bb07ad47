"""Prepares a release: version, changelog, sdist and wheel, whose tests it runs. It publishes nothing.

    make release VERSION=0.2.0

It writes the version and the date into CHANGELOG.md, CITATION.cff and hf_lamb/_version.py, builds both files into
dist/, and runs the sdist's tests against the wheel. Then it prints the commands that publish. If something fails, `git
restore` brings the three files back.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from datetime import date
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="such as 0.2.0")
    parser.add_argument("tests", nargs="*", help="what pytest runs; default: the unit tests")
    args = parser.parse_args()
    try:
        write_version(ROOT, args.version, date.today())
        rmtree(ROOT / "dist", ignore_errors=True)
        build(ROOT, ROOT / "dist")
        test_built(ROOT / "dist", args.tests)
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"release: {error}")
    built = ", ".join(sorted(path.name for path in (ROOT / "dist").iterdir()))
    print(
        f"Built and tested, in dist/: {built}. To publish:\n"
        f"git commit --all --message 'Release {args.version}' && git tag v{args.version}\n"
        f"git push origin HEAD v{args.version}\n"
        "python -m pip install twine && python -m twine upload dist/*\n"
        f"gh release create v{args.version} dist/* --title {args.version} --notes-file CHANGELOG.md"
    )


def write_version(root: Path, version: str, today: date) -> None:
    """Write version and date into the three files that have them. ValueError: nothing was written."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"the version {version} is not of the form 1.2.3")
    files = {
        "CHANGELOG.md": (r"(?m)^## \S+ \(unreleased\)$", f"## {version} ({today})"),
        "CITATION.cff": (r"(?m)^version: .*(\ndate-released: .*)?$", f"version: {version}\ndate-released: {today}"),
        "hf_lamb/_version.py": (r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"'),
    }
    written = {}
    for name, (pattern, line) in files.items():
        written[name], count = re.subn(pattern, line, (root / name).read_text())
        if count != 1:
            raise ValueError(f"{name}: expected one line like {pattern}, found {count}")
    for name, text in written.items():
        (root / name).write_text(text)


def build(source: Path, dist: Path) -> None:
    """Write the sdist, and the wheel that is made from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_built(dist: Path, tests: list[str]) -> None:
    """Run tests of the sdist with the wheel's hf_lamb, in this environment."""
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as packed:
            packed.extractall(folder, filter="data")
        source = Path(folder, sdist.name.removesuffix(".tar.gz"))
        rmtree(source / "hf_lamb")
        installed = Path(folder, "installed")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)]
        subprocess.run(pip, check=True)
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", "auto"]
        # What is built is not built once more from a folder that is no repository.
        subprocess.run(
            [*pytest, "--dist", "loadfile", "--ignore", "tests/test_packaging.py", *tests],
            cwd=source,
            env={**os.environ, "PYTHONPATH": str(installed)},
            check=True,
        )


if __name__ == "__main__":
    main()
