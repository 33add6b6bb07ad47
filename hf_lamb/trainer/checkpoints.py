"""Complete checkpoints: written to a temporary folder, renamed when complete, checked before a run resumes."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
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

# Folders beside the checkpoints. transformers takes every checkpoint-* for a checkpoint, and does not upload _*.
UNFINISHED = "_unfinished_checkpoints"  # checkpoints that are being written or deleted; useless after a kill
REPLACED = "_replaced_checkpoints"  # complete ones that are being replaced; they get their name back after a kill

# Keys of `TrainerState.stateful_callbacks` that belong to LambTrainer. Checkpoints have them in a file of their own,
# because Trainer warns of entries that belong to no callback of the run.
KEPT = ("noise_scale", "trust_ratios", "batch_schedule", "global_batch")
KEPT_FILE = "lamb_state.json"

# Errors of file systems that do not support an operation: fsync of a folder (SMB, some FUSE and NFS mounts), rename.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
UNSUPPORTED |= {errno.EISDIR, errno.ENOTTY}
CANNOT_RENAME = {errno.EXDEV, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EMFILE}

# The files that a run needs to resume exactly: at least one of each line, the usual one first. DeepSpeed writes
# `latest`; torch.distributed.checkpoint writes .metadata last into a folder of shards.
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


NOT_LAMB = "does not fit this run: resume with LAMB, whose state it holds"
RESUME_AS_SAVED = "resume with the options it was saved with"


class CheckpointError(ValueError):
    """A run cannot resume from a checkpoint, or cannot write it. The message has the path, reason and remedy."""


class Checkpoints:
    """Saves a trainer's checkpoints and model completely or not at all, even if the run is killed.

    * A checkpoint is written into `_unfinished_checkpoints/`. When every process has written its part and all of it is
      on the disk, the folder gets its name in one rename. An older checkpoint of that name stays complete until then.
      Checkpoints above `save_total_limit` are renamed before they are deleted. The next start or save deletes what a
      killed run left in `_unfinished_checkpoints/`.
    * `save_model` writes all files first and then renames them.

    All processes must share the disk; otherwise set `save_on_each_node`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.staging = False  # whether a checkpoint is being written

    @contextmanager
    def saving(self, run_dir: str) -> Iterator[None]:
        """Give what this block writes into `_unfinished_checkpoints` of `run_dir` its name when the block ends.

        Raises:
            CheckpointError: writing failed. Earlier checkpoints are complete.
        """
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
        except Exception as error:  # a full disk gives an OSError, torch's RuntimeError or a SafetensorError
            shutil.rmtree(os.path.join(run_dir, UNFINISHED), ignore_errors=True)
            why = _why(error, run_dir)
            raise CheckpointError(f"{name} was not saved {why}; earlier checkpoints are complete") from error
        finally:
            self.staging = False

        if trainer.args.should_save:
            new, best = os.path.join(run_dir, name), trainer.state.best_model_checkpoint
            rotate(Path(run_dir), trainer.args.save_total_limit, {Path(new), Path(best or new)})
        trainer.accelerator.wait_for_everyone()  # until it can be read under its name

    def _record_best(self, run_dir: str, name: str) -> None:
        """Record the path of the best checkpoint: Trainer looked for it in the folder of the unfinished ones."""
        state = self.trainer.state
        best = f"checkpoint-{state.best_global_step}"
        if best == name or os.path.isdir(os.path.join(run_dir, best)):
            state.best_model_checkpoint = os.path.join(run_dir, best)
            if self.trainer.args.should_save:
                state.save_to_json(os.path.join(run_dir, UNFINISHED, name, "trainer_state.json"))

    @contextmanager
    def saving_model(self, output_dir: str | None) -> Iterator[str | None]:
        """Yield the folder to write the model to; move its files to `output_dir` when the block ends.

        Raises:
            CheckpointError: writing failed.
        """
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
    """Return the checkpoint to resume from: the given one, or for True the newest complete one in `output_dir`.

    Raises:
        CheckpointError: there is none, or the given one is incomplete, damaged or saved with `save_only_model`.
    """
    if isinstance(resume_from_checkpoint, bool):
        newest = newest_complete_checkpoint(output_dir)
        if newest is None:
            raise CheckpointError(f"there is no complete checkpoint in {output_dir}: start without one")
        return newest
    check_checkpoint(resume_from_checkpoint)
    return resume_from_checkpoint


def check_optimizer(checkpoint: Path, lamb: bool | None) -> None:
    """Check that a checkpoint's optimizer is the run's.

    Args:
        checkpoint: the folder.
        lamb: whether the run's optimizer is a `Lamb`; None if not known.

    Raises:
        CheckpointError: one is a `Lamb` and the other is not.
    """
    holds_lamb = None if lamb is None else is_of_lamb(checkpoint / "optimizer.pt")
    if lamb and holds_lamb is False:
        raise CheckpointError(
            f"{checkpoint} does not fit this run: resume with the optimizer that wrote it, or convert its state with "
            "hf_lamb.convert_state_dict: it is not LAMB's"
        )
    if lamb is False and holds_lamb:
        raise CheckpointError(f"{checkpoint} {NOT_LAMB}")


def check_shapes(checkpoint: Path, model: nn.Module) -> None:
    """Raise CheckpointError if a weight has another shape than in the model; reads only the headers of the files."""
    own = model.state_dict()
    for file in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - safe_open is not iterable
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
    """Turn errors about shapes, which loading in this block raises, into a CheckpointError of one line."""
    try:
        yield
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        fault = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line).rstrip(".")
    except CheckpointException as error:  # not a subclass of Exception
        fault = str(next(iter(error.failures.values()))[0])
    else:
        return
    raise CheckpointError(f"{checkpoint} is of another model: {fault}; {RESUME_AS_SAVED}") from None


@contextmanager
def refusing_another_optimizer(checkpoint: str | None, optimizer: Any) -> Iterator[None]:
    """Raise CheckpointError if the state that this block loads does not belong to the optimizer."""
    before = has_lamb_options(optimizer)
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} does not fit this run: {error}") from error
    if has_lamb_options(optimizer) and not before:  # torch's optimizers load any options
        raise CheckpointError(f"{checkpoint} {NOT_LAMB}")


@contextmanager
def kept_apart(state: TrainerState) -> Iterator[dict[str, Any]]:
    """Remove LambTrainer's entries from the state for this block, so that Trainer does not see them."""
    callbacks: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
    kept = {key: callbacks.pop(key) for key in KEPT if key in callbacks}
    try:
        yield kept
    finally:
        callbacks.update(kept)


def load_kept(state: TrainerState, checkpoint: str | None) -> None:
    """Put LambTrainer's entries of a checkpoint back into the state."""
    if checkpoint and (kept := read_kept(checkpoint)):
        state.stateful_callbacks.update(kept)  # type: ignore[union-attr]


def read_kept(checkpoint: str) -> dict[str, Any]:
    """Return LambTrainer's entries of a checkpoint, none of another trainer's."""
    file = Path(checkpoint, KEPT_FILE)
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _why(error: Exception, folder: str | os.PathLike[str]) -> str:
    """Return the folder, its free space and the error's first line."""
    try:
        room = f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free)"
    except OSError:  # the folder does not exist, or its file system reports no free space
        room = ""
    return f"in {folder}{room}: {str(error).partition(chr(10))[0]}"


def has_lamb_options(optimizer: Any) -> bool:
    return any("layer_adaptation" in group for group in optimizer.param_groups)


def is_of_lamb(file: Path) -> bool | None:
    """Return whether an optimizer's file is LAMB's, from its options; None if that is unclear."""
    try:
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        groups = saved["param_groups"]
    except Exception:  # there is no file, or it is damaged and Trainer will raise its own error
        return None
    return any("layer_adaptation" in group for group in groups) if groups else None


# -- which checkpoints are complete -----------------------------------------------------------------------------------


def newest_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the complete checkpoint-N with the highest N in a folder.

    It logs one line with the reason for each incomplete checkpoint that it skips.

    Args:
        folder: an output directory of Trainer or LambTrainer.

    Returns:
        The path, or None if there is no complete checkpoint.
    """
    folder = Path(folder)
    restore(folder)
    numbers = [int(path.name[11:]) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    for checkpoint in (folder / f"checkpoint-{number}" for number in sorted(numbers, reverse=True)):
        fault = find_fault(checkpoint)
        if fault is None:
            return str(checkpoint)
        logger.warning(f"skipping {checkpoint}: it {fault}")
    return None


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """Check that a run can resume from a checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated or unreadable.
    """
    fault = find_fault(Path(checkpoint))
    if fault is not None:
        raise CheckpointError(
            f"{checkpoint} is no checkpoint: it {fault}; resume from an earlier one, or start without one"
        )


def find_fault(checkpoint: Path) -> str | None:
    """Return what is missing or unreadable, as the end of a sentence; None if the checkpoint is complete.

    It opens files but does not read them: it finds missing, truncated and empty files, but no flipped bits.
    """
    if (checkpoint / "checkpoint-is-incomplete.txt").exists():  # transformers' enable_jit_checkpoint writes this
        return "was still being written"
    fault = find_deepspeed_fault(checkpoint)
    if fault is not None:
        return fault
    for patterns in PARTS:
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"has no {patterns[0]}"
    ranks = {int(file.stem[10:]) for file in checkpoint.glob("rng_state_*.pth")}
    expected = range(max(2, max(ranks) + 1)) if ranks else ()  # numbered files mean at least two processes
    for rank in expected:
        if rank not in ranks:
            return f"has no rng_state_{rank}.pth"
    for file in (file for pattern in READ_TO_RESUME for file in sorted(checkpoint.glob(pattern))):
        try:
            check_readable(file)
        except (OSError, ValueError, EOFError, UnpicklingError, zipfile.BadZipFile, SafetensorError) as error:
            return f"has a damaged {file.relative_to(checkpoint)} ({error})"
    return None


def find_deepspeed_fault(checkpoint: Path) -> str | None:
    """Do what `find_fault` does, for DeepSpeed's files; None for checkpoints without them.

    `latest` holds the name of a folder. ZeRO-1, 2 and 3 write the optimizer into one file for each process, and
    `zero_to_fp32.py` beside the folder; ZeRO-3 writes the model into one file for each process too.
    """
    if not (checkpoint / "latest").is_file():
        any_folder = any(checkpoint.glob("global_step*"))
        return "has no latest, the file that names the folder of DeepSpeed" if any_folder else None
    name = (checkpoint / "latest").read_text(errors="replace").strip()
    if not name:
        return "has a damaged latest (it is empty)"
    folder = checkpoint / name
    if not folder.is_dir():
        return f"has no {name}/"
    for pattern in ("*_model_states.pt", *["*_optim_states.pt"] * (checkpoint / "zero_to_fp32.py").exists()):
        if not any(folder.glob(pattern)):
            return f"has no {name}/{pattern}"
    processes = len(list(checkpoint.glob("rng_state_*.pth"))) or 1
    for kind in ("model", "optim"):
        shards = sorted(folder.glob(f"*zero_pp_rank_*_{kind}_states.pt"))
        ranks = {int(re.findall(r"zero_pp_rank_(\d+)", shard.name)[0]) for shard in shards}
        missing = next(rank for rank in range(len(shards) + 1) if rank not in ranks)
        if shards and (missing < max(ranks) or len(shards) < processes):
            return f"has no {name}/{re.sub(r'pp_rank_[0-9]+', f'pp_rank_{missing}', shards[0].name)}"
    for file in sorted(folder.glob("*_states.pt")):
        if file.stat().st_size == 0:
            return f"has a damaged {name}/{file.name} (it is empty)"
    return None


def check_readable(file: Path) -> None:
    """Open a file and raise an error if it does not have its suffix's format, or is shorter than its index says."""
    if file.suffix == ".json":
        content = json.loads(file.read_bytes())
        for shard in sorted(set(content["weight_map"].values())) if file.name.endswith(".index.json") else ():
            if not (file.parent / shard).exists():
                raise ValueError(f"{shard} is missing")
    elif file.name == ".metadata":
        for shard in FileSystemReader(file.parent).read_metadata().storage_data.values():
            if (file.parent / shard.relative_path).stat().st_size < shard.offset + shard.length:
                raise ValueError(f"{shard.relative_path} is truncated")
    elif file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            pass
    else:
        zipfile.ZipFile(file).close()


# -- renaming and deleting --------------------------------------------------------------------------------------------


def publish(staged: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name, then delete an older one of that name."""
    fsync_tree(staged)
    if final.exists() or final.is_symlink():
        replaced = final.parent / REPLACED
        replaced.mkdir(exist_ok=True)  # it may exist: some file systems cannot delete files that are open elsewhere
        move(final, replaced / final.name)
    move(staged, final)
    fsync_tree(final.parent, recurse=False)
    tidy(final.parent)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, or copy it if the file system cannot rename.

    A kill may leave a copy incomplete; `find_fault` detects that.
    """
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
    """Delete the oldest checkpoints that are not in `keep` until `limit` are left; None and 0 mean no limit."""
    if limit is None or limit <= 0:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True)]
    surplus = len(checkpoints) - max(limit, len(keep))
    for checkpoint in [path for path in checkpoints if path not in keep][: max(surplus, 0)]:
        try:
            (folder / UNFINISHED).mkdir(exist_ok=True)
            checkpoint.rename(folder / UNFINISHED / checkpoint.name)
        except OSError:  # do not stop the run for this: the new checkpoint is saved
            shutil.rmtree(checkpoint, ignore_errors=True)
    tidy(folder)


def restore(folder: Path) -> None:
    """Give a replaced checkpoint its name back if the run was killed before the new one had that name."""
    for replaced in (folder / REPLACED).glob("*"):
        if not (folder / replaced.name).exists():
            with suppress(OSError):  # another process has done it, or the folder is read-only
                replaced.rename(folder / replaced.name)


def tidy(folder: Path) -> None:
    """Delete unfinished and replaced checkpoints, of a killed run or of this one."""
    restore(folder)
    for leftover in (UNFINISHED, REPLACED):
        shutil.rmtree(folder / leftover, ignore_errors=True)


def move_files(source: Path, target: Path) -> None:
    """Move all files of a folder to another one, replacing those of the same names."""
    fsync_tree(source)
    for file in [path for path in source.rglob("*") if path.is_file()]:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.replace(place)
        except OSError as error:  # the target is on another file system, or the file system cannot rename
            if error.errno not in CANNOT_RENAME:
                raise
            shutil.copy(file, place)
    shutil.rmtree(source, ignore_errors=True)


def fsync_tree(folder: Path, recurse: bool = True) -> None:
    """Call fsync on a folder and everything in it, so that the disk has the files before it has a later rename.

    Many file systems do not support fsync of folders; their error is ignored.
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
