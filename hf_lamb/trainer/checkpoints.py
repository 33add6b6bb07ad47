"""Checkpoints that are whole: written under another name, renamed when complete, looked at before a run resumes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.nn.parameter import is_lazy
from transformers import Trainer, TrainerState
from transformers.trainer_utils import sort_checkpoints

__all__ = ["CheckpointError", "Checkpoints", "check_checkpoint", "newest_complete_checkpoint"]

logger = logging.getLogger(__name__)

# Folders beside the checkpoints. transformers takes every checkpoint-* for a checkpoint and uploads all but _*.
UNFINISHED = "_unfinished_checkpoints"  # being written, or being deleted: of no use to anybody after a kill
REPLACED = "_replaced_checkpoints"  # whole, and has its name back if its successor did not get it

# What LambTrainer's parts keep in `TrainerState.stateful_callbacks` while training. In a checkpoint it has a file of
# its own: of entries that are no callback of this run Trainer says that they are ignored.
KEPT = ("noise_scale", "trust_ratios")
KEPT_FILE = "lamb_state.json"

# What file systems answer for what they do not have: fsync of a folder (SMB, some FUSE and NFS mounts), renaming one.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
UNSUPPORTED |= {errno.EISDIR, errno.ENOTTY}
CANNOT_RENAME = {errno.EXDEV, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EMFILE}

# What a run needs to go on exactly; of each line at least one, the usual one first. `latest` is DeepSpeed's; .metadata
# is what torch.distributed.checkpoint writes last into a folder of shards.
PARTS = (
    ("trainer_state.json",),
    (
        "model.safetensors",
        "model*.safetensors",
        "pytorch_model*.bin",
        "pytorch_model*/.metadata",
        "**/adapter_model.*",
        "latest",
    ),
    ("optimizer.pt", "*optimizer.*", "optimizer_*.bin", "optimizer_*/.metadata", "latest"),
    ("scheduler.pt", "latest"),
    ("rng_state.pth", "rng_state_*.pth"),
)
READ_TO_RESUME = ("*.json", "*.safetensors", "*.pt", "*.pth", "pytorch_model*.bin", "optimizer*.bin", "*/.metadata")


NOT_LAMB = "does not fit this run: it holds the state of LAMB; resume with it"
RESUME_AS_SAVED = "resume with the options it was saved with"


class CheckpointError(ValueError):
    """A checkpoint that a run cannot go on from, or cannot write. The message says which one, why, and what to do."""


class Checkpoints:
    """A trainer's checkpoints, and the model that it saves: whole or not there, whenever the run is killed.

    * A checkpoint is written into `_unfinished_checkpoints/` and gets its name, in one rename, when every process has
      written its part and all of it is on the disk. One that had the name before stays whole until then. Checkpoints
      that `save_total_limit` makes superfluous lose their name before they are deleted. What a killed run left in
      `_unfinished_checkpoints/` is deleted at the next start or save.
    * The files of `save_model` are renamed into their place when all of them are written.

    The disk must be one that all processes share, or `save_on_each_node` be set.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.staging = False  # whether a checkpoint is being written

    @contextmanager
    def saving(self, run_dir: str) -> Iterator[None]:
        """What this block writes into `_unfinished_checkpoints` of `run_dir` gets its name when all of it is there."""
        trainer, name = self.trainer, f"checkpoint-{self.trainer.state.global_step}"
        os.makedirs(run_dir, exist_ok=True)
        if trainer.args.should_save:
            tidy(Path(run_dir))
        trainer.accelerator.wait_for_everyone()

        self.staging = True
        try:
            with kept_apart(trainer.state) as kept:
                yield
                self._record_best(run_dir, name)
            if kept and trainer.args.should_save:
                Path(run_dir, UNFINISHED, name, KEPT_FILE).write_text(json.dumps(kept), encoding="utf-8")
            trainer.accelerator.wait_for_everyone()  # until every process has written its part
            if trainer.args.should_save:
                publish(Path(run_dir, UNFINISHED, name), Path(run_dir, name))
        except Exception as error:  # a full disk is an OSError, a RuntimeError of torch's, a SafetensorError
            shutil.rmtree(os.path.join(run_dir, UNFINISHED), ignore_errors=True)
            raise CheckpointError(f"{name} was not saved {_why(error, run_dir)}; those before it are whole") from error
        finally:
            self.staging = False

        if trainer.args.should_save:
            new, best = os.path.join(run_dir, name), trainer.state.best_model_checkpoint
            rotate(Path(run_dir), trainer.args.save_total_limit, {Path(new), Path(best or new)})
        trainer.accelerator.wait_for_everyone()  # until it can be read under its name

    def _record_best(self, run_dir: str, name: str) -> None:
        """Trainer has looked for the best checkpoint among the unfinished ones."""
        state = self.trainer.state
        best = f"checkpoint-{state.best_global_step}"
        if best == name or os.path.isdir(os.path.join(run_dir, best)):
            state.best_model_checkpoint = os.path.join(run_dir, best)
            if self.trainer.args.should_save:
                state.save_to_json(os.path.join(run_dir, UNFINISHED, name, "trainer_state.json"))

    @contextmanager
    def saving_model(self, output_dir: str | None) -> Iterator[str | None]:
        """Where to write the model; its files are renamed into their place at the end of the block."""
        if self.staging:
            yield output_dir
            return
        args = self.trainer.args
        folder = Path(output_dir or str(args.output_dir))
        if args.should_save:
            tidy(folder)
        try:
            yield str(folder / UNFINISHED)
            if args.should_save:
                move_files(folder / UNFINISHED, folder)
        except Exception as error:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            raise CheckpointError(f"the model was not saved {_why(error, folder)}; make room and resume") from error


def checkpoint_to_resume(resume_from_checkpoint: str | Literal[True], output_dir: str) -> str:
    """A complete checkpoint: this one, or for True the newest in `output_dir`, also among those of a stock Trainer.

    Raises:
        CheckpointError: there is none, or this one is torn or damaged, or of `save_only_model`.
    """
    if isinstance(resume_from_checkpoint, bool):
        newest = newest_complete_checkpoint(output_dir)
        if newest is None:
            raise CheckpointError(f"there is no complete checkpoint in {output_dir}: start without one")
        return newest
    check_checkpoint(resume_from_checkpoint)
    return resume_from_checkpoint


def check_optimizer(checkpoint: Path, lamb: bool | None) -> None:
    """Raise for the state of another optimizer than this run's; `lamb`: whether that is a Lamb, None if not known."""
    holds_lamb = None if lamb is None else is_of_lamb(checkpoint / "optimizer.pt")
    if lamb and holds_lamb is False:
        raise CheckpointError(
            f"{checkpoint} does not fit this run: it holds the state of another optimizer than LAMB: resume with "
            "that one, or see hf_lamb.convert_state_dict"
        )
    if lamb is False and holds_lamb:
        raise CheckpointError(f"{checkpoint} {NOT_LAMB}")


def check_shapes(checkpoint: Path, model: nn.Module) -> None:
    """Raise for the weights of another model, by the heads of the files."""
    own = model.state_dict()
    for file in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118, which it has in place of iteration
                if name not in own or not isinstance(own[name], Tensor) or is_lazy(own[name]):
                    continue
                theirs, mine = torch.Size(weights.get_slice(name).get_shape()), own[name].shape
                if theirs != mine:
                    raise CheckpointError(
                        f"{checkpoint} is of another model: size mismatch for {name}: {theirs} in the "
                        f"checkpoint, {mine} in this model; {RESUME_AS_SAVED}"
                    )


@contextmanager
def refusing_another_model(checkpoint: str) -> Iterator[None]:
    """Say in one line that the weights do not fit, where only loading them tells."""
    try:
        yield
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        fault = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line).rstrip(".")
    except CheckpointException as error:  # which is no Exception
        fault = str(next(iter(error.failures.values()))[0])
    else:
        return
    raise CheckpointError(f"{checkpoint} is of another model: {fault}; {RESUME_AS_SAVED}") from None


@contextmanager
def refusing_another_optimizer(checkpoint: str | None, optimizer: Any) -> Iterator[None]:
    """The same for the state of the optimizer."""
    before = has_lamb_options(optimizer)
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} does not fit this run: {error}") from error
    if has_lamb_options(optimizer) and not before:  # torch's own optimizers take what they are given
        raise CheckpointError(f"{checkpoint} {NOT_LAMB}")


@contextmanager
def kept_apart(state: TrainerState) -> Iterator[dict[str, Any]]:
    """Take what LambTrainer's parts keep out of the state for a while: Trainer does not see it."""
    callbacks: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
    kept = {key: callbacks.pop(key) for key in KEPT if key in callbacks}
    try:
        yield kept
    finally:
        callbacks.update(kept)


def load_kept(state: TrainerState, checkpoint: str | None) -> None:
    """Put what LambTrainer's parts kept in a checkpoint back into the state."""
    file = Path(checkpoint or "", KEPT_FILE)
    if checkpoint and file.is_file():
        state.stateful_callbacks.update(json.loads(file.read_text(encoding="utf-8")))  # type: ignore[union-attr]


def _why(error: Exception, folder: str | os.PathLike[str]) -> str:
    """Where, and the error's first line."""
    try:
        room = f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free)"
    except OSError:  # the folder could not be made, or its file system does not count
        room = ""
    return f"in {folder}{room}: {str(error).partition(chr(10))[0]}"


def has_lamb_options(optimizer: Any) -> bool:
    return any("layer_adaptation" in group for group in optimizer.param_groups)


def is_of_lamb(file: Path) -> bool | None:
    """Whether an optimizer's file is LAMB's, by its options and state; None where it does not tell."""
    try:
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        groups = saved["param_groups"]
        state: dict[str, Any] = next(iter(saved["state"].values()), {})
    except Exception:  # there is none, or Trainer will say what is wrong with it
        return None
    if any("layer_adaptation" in group for group in groups):
        return True
    foreign = any("amsgrad" in group for group in groups) or set(state) not in (
        set(),
        {"step", "exp_avg", "exp_avg_sq"},
    )
    return False if foreign else None


# -- which checkpoints are whole --------------------------------------------------------------------------------------


def newest_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The checkpoint-N with the highest N that a run can go on from; None if there is none.

    Says in one log line each which ones it passes over, and why.
    """
    folder = Path(folder)
    restore(folder)
    numbers = [int(path.name[11:]) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    for checkpoint in (folder / f"checkpoint-{number}" for number in sorted(numbers, reverse=True)):
        fault = find_fault(checkpoint)
        if fault is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is passed over: it {fault}")
    return None


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if a run cannot go on from here."""
    fault = find_fault(Path(checkpoint))
    if fault is not None:
        raise CheckpointError(f"{checkpoint} is no checkpoint: it {fault}; resume from an earlier one, or start anew")


def find_fault(checkpoint: Path) -> str | None:
    """What is missing or unreadable, as the end of a sentence.

    Files are opened, not read: this finds what is torn, truncated or empty, but no flipped bit.
    """
    if (checkpoint / "checkpoint-is-incomplete.txt").exists():  # of transformers' enable_jit_checkpoint
        return "was still being written"
    for patterns in PARTS:
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"has no {patterns[0]}"
    ranks = {int(file.stem[10:]) for file in checkpoint.glob("rng_state_*.pth")}
    for rank in range(max([1, *ranks]) + 1 if ranks else 0):
        if rank not in ranks:
            return f"has no rng_state_{rank}.pth"
    for file in (file for pattern in READ_TO_RESUME for file in sorted(checkpoint.glob(pattern))):
        try:
            check_readable(file)
        except (OSError, ValueError, EOFError, UnpicklingError, zipfile.BadZipFile, SafetensorError) as error:
            return f"has a damaged {file.relative_to(checkpoint)} ({error})"
    return None


def check_readable(file: Path) -> None:
    """Raise if a file is not what its suffix says, or shorter than its index."""
    if file.suffix == ".json":
        content = json.loads(file.read_bytes())
        for shard in sorted(set(content["weight_map"].values())) if file.name.endswith(".index.json") else ():
            if not (file.parent / shard).exists():
                raise ValueError(f"{shard} is missing")
    elif file.name == ".metadata":
        for shard in FileSystemReader(file.parent).read_metadata().storage_data.values():
            if (file.parent / shard.relative_path).stat().st_size < shard.offset + shard.length:
                raise ValueError(f"{shard.relative_path} is cut short")
    elif file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            pass
    else:
        zipfile.ZipFile(file).close()


# -- renaming and deleting --------------------------------------------------------------------------------------------


def publish(staged: Path, final: Path) -> None:
    """Give a complete checkpoint its name; what had the name goes when it has."""
    fsync_tree(staged)
    if final.exists() or final.is_symlink():
        replaced = final.parent / REPLACED
        replaced.mkdir(exist_ok=True)  # what is open elsewhere cannot be deleted on some file systems
        move(final, replaced / final.name)
    move(staged, final)
    fsync_tree(final.parent, recurse=False)
    tidy(final.parent)


def move(source: Path, target: Path) -> None:
    """Rename; where the file system cannot, copy, which a kill may leave half-done: such a one is not resumed from."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in CANNOT_RENAME:
            raise
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)
        fsync_tree(target)
        shutil.rmtree(source) if source.is_dir() else source.unlink()


def rotate(folder: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints but these until no more than `limit` are left; None and 0 are no limit."""
    if limit is None or limit <= 0:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True)]
    surplus = len(checkpoints) - max(limit, len(keep))
    for checkpoint in [path for path in checkpoints if path not in keep][: max(surplus, 0)]:
        try:
            (folder / UNFINISHED).mkdir(exist_ok=True)
            checkpoint.rename(folder / UNFINISHED / checkpoint.name)
        except OSError:  # the new one is saved: this is no reason to end the run
            shutil.rmtree(checkpoint, ignore_errors=True)
    tidy(folder)


def restore(folder: Path) -> None:
    """Give a replaced checkpoint its name back if the run was killed before its successor got it."""
    for replaced in (folder / REPLACED).glob("*"):
        if not (folder / replaced.name).exists():
            with suppress(OSError):  # another process did it, or the folder is for reading only
                replaced.rename(folder / replaced.name)


def tidy(folder: Path) -> None:
    """Delete what a killed run, or this one, left unfinished or has replaced."""
    restore(folder)
    for leftover in (UNFINISHED, REPLACED):
        shutil.rmtree(folder / leftover, ignore_errors=True)


def move_files(source: Path, target: Path) -> None:
    """Rename files into their place, over those that were there."""
    fsync_tree(source)
    for file in [path for path in source.rglob("*") if path.is_file()]:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.replace(place)
        except OSError as error:  # onto another file system, or one that does not rename
            if error.errno not in CANNOT_RENAME:
                raise
            shutil.copy(file, place)
    shutil.rmtree(source, ignore_errors=True)


def fsync_tree(folder: Path, recurse: bool = True) -> None:
    """Wait until a folder, and what is in it, is on the disk, so that no rename is there before what it names.

    Where a file system has no such thing, as many have none for folders, its answer is no failure to save.
    """
    if os.name != "posix":
        return
    for path in [*(folder.rglob("*") if recurse else ()), folder]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                continue
            raise
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        finally:
            os.close(descriptor)
