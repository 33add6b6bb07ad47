"""Small grey images with labels: MNIST's file format, or the digits that scikit-learn brings."""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FILES = {
    part: (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    for part, stem in {"train": "train", "test": "t10k"}.items()
}


class Images(NamedTuple):
    """pixels: float32 in [0, 1], [n, rows, columns]; labels: int64, [n]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Images":
        return Images(self.pixels[indices], self.labels[indices])

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))


class Split(NamedTuple):
    train: Images
    validation: Images  # the learning rates are chosen by it
    test: Images  # for the results only


def load_images(data_dir: str | None) -> Split:
    """The images of a folder with MNIST's four files, gzipped or not, or scikit-learn's 1,797 digits of 8 x 8 pixels.

    A tenth of the training images becomes the validation part; of the digits, a fifth becomes the test part first.
    Raises ValueError with one line that names the file and the remedy.
    """
    if data_dir is None:
        try:
            everything = digits()
        except ValueError as error:
            raise ValueError(f"{error}; or give --data_dir") from None
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
        rest, test = everything.take(order[len(order) // 5 :]), everything.take(order[: len(order) // 5])
    else:
        rest, test = (_idx_images(Path(data_dir), *FILES[part]) for part in ("train", "test"))
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(1))
    tenth = len(rest) // 10
    return Split(rest.take(order[tenth:]), rest.take(order[:tenth]), test)


def digits() -> Images:
    """scikit-learn's 1,797 images of 8 x 8 pixels, in its order. Raises ValueError where it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install scikit-learn") from None
    found = load_digits()
    return Images(torch.from_numpy(found.images / 16).float(), torch.from_numpy(found.target).long())


def _idx_images(folder: Path, images: str, labels: str) -> Images:
    pixels, classes = read_idx(_find(folder, images)), read_idx(_find(folder, labels))
    if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
        raise ValueError(
            f"{folder}: {images} has shape {pixels.shape}, {labels} has {classes.shape}: expected [n, rows, columns] "
            "and [n]; are the files those of one data set?"
        )
    if classes.size and classes.max() > 9:
        raise ValueError(f"{folder}: {labels} has the label {classes.max()}: give images of ten classes, 0 to 9")
    return Images(torch.from_numpy(pixels / np.float32(255)), torch.from_numpy(classes.astype(np.int64)))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(
        f"there is no {name} or {name}.gz in {str(folder)!r}: --data_dir takes a folder with MNIST's four files"
    )


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes, gzipped or not: two zero bytes, type 8, number of dimensions, sizes, then the bytes.

    Raises ValueError for anything else.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {str(path)!r} ({error}): download it again") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{str(path)!r} is no IDX file of bytes: it begins with {data[:4]!r}")
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise ValueError(f"{str(path)!r} ends within its header: download it again")
    shape = tuple(np.frombuffer(data[4:header], ">u4").tolist())
    if len(data) - header != math.prod(shape):
        raise ValueError(f"{str(path)!r} holds {len(data) - header} bytes for shape {shape}: download it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
