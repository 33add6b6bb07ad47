"""Protects the LSTM recipe: MNIST's files are read as what they are, and the test part decides nothing."""

import gzip
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes import lstm_mnist
from recipes.lib.images import FILES, load_images, read_idx
from recipes.study.sweep import read_records

SMALL = ["--use_cpu", "True", "--optimizers", "lamb", "sgd", "--epochs", "1", "--hidden_size", "4", "--seeds", "2"]
SMALL += ["--evaluations", "2"]


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder in MNIST's format: 60 + 20 images of 3 x 2 pixels, whose first pixel is ten times their class."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % 10
        images = np.zeros((count, 3, 2))
        images[:, 0, 0] = 10 * labels
        for name, array in zip(FILES[part], (images, labels), strict=True):
            packed = gzip.compress(idx(array)) if part == "train" else idx(array)
            (folder / (f"{name}.gz" if part == "train" else name)).write_bytes(packed)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lstm_mnist", *arguments])
    lstm_mnist.main()


def test_mnists_files_are_read(mnist: Path) -> None:
    """Gzipped or not; pixels from 0 to 1; every image with its own label; a tenth of the training images chooses."""
    data = load_images(str(mnist))
    assert [len(part) for part in data] == [54, 6, 20]
    for part in data:
        assert part.pixels.shape[1:] == (3, 2)
        assert part.pixels.dtype == torch.float32
        assert torch.equal((part.pixels[:, 0, 0] * 25.5).round().long(), part.labels)


def test_the_digits_are_split_without_overlap() -> None:
    pytest.importorskip("sklearn")
    data = load_images(None)
    assert [len(part) for part in data] == [1295, 143, 359]
    rows = torch.cat([part.pixels.flatten(1) for part in data])
    assert len(rows) == 1797
    assert rows.min() == 0
    assert rows.max() == 1


def test_a_study_of_mnists_files(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Both batch sizes, curves of all three parts, the table and a page that asks nobody for anything."""
    output = tmp_path / "out"
    arguments = [*SMALL, "--data_dir", str(mnist), "--batch_sizes", "3", "27", "--output_dir", str(output)]
    run(monkeypatch, *arguments)
    records = read_records(output / "trials.jsonl")
    assert {record["steps"] for record in records} == {18, 2}
    for record in records:
        assert record["study"]["data"] == "mnist"
        last = record["curve"][-1]
        assert record["objective"] == last["validation_loss"]
        assert {f"{part}_{q}" for part in ("train", "test") for q in ("loss", "accuracy")} <= last.keys()
    assert re.search(r"\| 27 \| 2 \| (LAMB|SGD) \|", capsys.readouterr().out)
    page = (output / "report.html").read_text()
    assert not re.findall(r"https?://|<script|<link|url\(", page)
    assert page.count('<img src="data:image/png;base64,') == 2
    assert str(tmp_path) not in (output / "trials.jsonl").read_text().replace(records[0]["command"], "")


BAD_FILES = [
    (b"", "is no IDX file of bytes: it begins with b''"),
    (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "is no IDX file of bytes"),
    (idx(np.zeros(5))[:-1], r"holds 4 bytes for shape \(5,\): download it again"),
    (idx(np.zeros(5)) + b"\0", r"holds 6 bytes for shape \(5,\)"),
    (b"\x00\x00\x08\x03\x00\x00", "ends within its header: download it again"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_what_is_no_idx_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


def test_half_a_download_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(idx(np.arange(100)))[:60])
    with pytest.raises(ValueError, match=r"cannot read .*file\.gz.*: download it again"):
        read_idx(tmp_path / "file.gz")


BAD = [
    (["--data_dir", "nowhere"], "there is no train-images-idx3-ubyte or .* in 'nowhere': --data_dir takes a folder"),
    (["--batch_sizes", "4096"], "--batch_sizes 4096 is more than the 1295 training images: lower it"),
    (["--batch_sizes", "1295"], "--epochs 1 are 1 steps at batch 1295, fewer than --evaluations 2"),
    (["--optimizers", "adagrad"], "--optimizers adagrad: expected some of lamb, adamw, adam, sgd"),
    (["--hidden_size", "0"], "--hidden_size 0: expected at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gets_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--data_dir" not in arguments:
        pytest.importorskip("sklearn")
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *SMALL, "--output_dir", str(tmp_path / "out"), *arguments)
    (line,) = str(exit_.value).splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_labels_of_another_data_set_are_refused(mnist: Path) -> None:
    (mnist / FILES["test"][1]).write_bytes(idx(np.zeros(7)))
    with pytest.raises(ValueError, match=r"are the files those of one data set\?"):
        load_images(str(mnist))


def test_more_than_ten_classes_are_refused(mnist: Path) -> None:
    """EMNIST's letters, for example: the classifier has ten outputs."""
    (mnist / FILES["test"][1]).write_bytes(idx(np.arange(20)))
    with pytest.raises(ValueError, match=r"has the label 19: give images of ten classes, 0 to 9"):
        load_images(str(mnist))


def test_folders_of_one_name_are_told_apart(mnist: Path) -> None:
    """torchvision's are all called raw."""
    one = lstm_mnist.facts_of(lstm_mnist.LstmArguments(data_dir=str(mnist)), load_images(str(mnist)))
    (mnist / FILES["test"][1]).write_bytes(idx((np.arange(20) + 1) % 10))
    other = lstm_mnist.facts_of(lstm_mnist.LstmArguments(data_dir=str(mnist)), load_images(str(mnist)))
    assert {name for name in one if one[name] != other[name]} == {"content"}
