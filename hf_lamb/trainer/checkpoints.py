"""Checkpoints that are whole: written under another name, renamed when complete, looked at before a run resumes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.nn.parameter import is_lazy
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, sort_checkpoints

__all__ = ["CheckpointError", "WholeCheckpointTrainer", "check_checkpoint", "newest_complete_checkpoint"]

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


class WholeCheckpointTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints are whole or not there, whenever it is killed.

    * A checkpoint is written into `_unfinished_checkpoints/` and gets its name, in one rename, when every process has
      written its part and all of it is on the disk. One that had the name before stays whole until then. Checkpoints
      that `save_total_limit` makes superfluous lose their name before they are deleted. What a killed run left in
      `_unfinished_checkpoints/` is deleted at the next start or save.
    * `train(resume_from_checkpoint=True)` takes the newest complete checkpoint, also among those of a stock Trainer,
      whose last one may be torn; `train(resume_from_checkpoint="checkpoint-8")` raises CheckpointError if that one is
      damaged, or of another model or optimizer. Checkpoints of `save_only_model` cannot be resumed.
    * The files of `save_model` are renamed into their place when all of them are written.
    * A run resumed from its last checkpoint takes no step more; Trainer's takes one, where the last epoch is not over.

    The disk must be one that all processes share, or `save_on_each_node` be set.
    """

    _staging = False  # whether a checkpoint is being written

    # -- saving ------------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self._staging else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        os.makedirs(run_dir, exist_ok=True)
        if self.args.should_save:
            tidy(Path(run_dir))
        self.accelerator.wait_for_everyone()

        self._staging = True
        try:
            kept: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
            own = {key: kept.pop(key) for key in KEPT if key in kept}
            try:
                super()._save_checkpoint(model, trial)
                self._record_best(run_dir, name)
            finally:
                kept.update(own)
            if own and self.args.should_save:
                Path(run_dir, UNFINISHED, name, KEPT_FILE).write_text(json.dumps(own), encoding="utf-8")
            self.accelerator.wait_for_everyone()  # until every process has written its part
            if self.args.should_save:
                publish(Path(run_dir, UNFINISHED, name), Path(run_dir, name))
        except Exception as error:  # a full disk is an OSError, a RuntimeError of torch's, a SafetensorError
            shutil.rmtree(os.path.join(run_dir, UNFINISHED), ignore_errors=True)
            raise CheckpointError(f"{name} was not saved {_why(error, run_dir)}; those before it are whole") from error
        finally:
            self._staging = False

        if self.args.should_save:
            new, best = os.path.join(run_dir, name), self.state.best_model_checkpoint
            rotate(Path(run_dir), self.args.save_total_limit, {Path(new), Path(best or new)})
        self.accelerator.wait_for_everyone()  # until it can be read under its name
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, name))

    def _record_best(self, run_dir: str, name: str) -> None:
        """Trainer has looked for the best checkpoint among the unfinished ones."""
        best = f"checkpoint-{self.state.best_global_step}"
        if best == name or os.path.isdir(os.path.join(run_dir, best)):
            self.state.best_model_checkpoint = os.path.join(run_dir, best)
            if self.args.should_save:
                self.state.save_to_json(os.path.join(run_dir, UNFINISHED, name, "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # the upload goes on in the background: not from a folder about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._staging:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            tidy(folder)
        try:
            super()._save(str(folder / UNFINISHED), state_dict)
            if self.args.should_save:
                move_files(folder / UNFINISHED, folder)
        except Exception as error:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            raise CheckpointError(f"the model was not saved {_why(error, folder)}; make room and resume") from error

    # -- resuming ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer's, from a complete checkpoint or not at all."""
        output_dir = str(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete_checkpoint(output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(f"there is no complete checkpoint in {output_dir}: start without one")
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        if resume_from_checkpoint:
            self.check_fit(Path(resume_from_checkpoint))
        if self.args.should_save:
            tidy(Path(output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_fit(self, checkpoint: Path, optimizer: bool = True) -> None:
        """Raise for another model or optimizer while nothing is loaded, as far as the heads of the files tell."""
        lamb = self._trains_lamb()
        holds_lamb = is_of_lamb(checkpoint / "optimizer.pt") if optimizer and lamb is not None else None
        if lamb and holds_lamb is False:
            raise CheckpointError(
                f"{checkpoint} does not fit this run: it holds the state of another optimizer than LAMB: resume with "
                "that one, or see hf_lamb.convert_state_dict"
            )
        if lamb is False and holds_lamb:
            raise CheckpointError(f"{checkpoint} {NOT_LAMB}")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.model_init is not None:
            return  # the shapes here are not those of the files, or not yet those of the run
        own = {} if self.model is None else self.model.state_dict()
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

    def _trains_lamb(self) -> bool | None:
        """Whether this run's optimizer will be a Lamb; None where that is not known before it is made."""
        return None if self.optimizer is None else has_lamb_options(self.optimizer)

    # -- what LambTrainer's parts keep -------------------------------------------------------------------------------

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        epochs_and_steps = super()._init_training_state(*args, **kwargs)
        resume_from_checkpoint = args[3]
        file = Path(resume_from_checkpoint or "", KEPT_FILE)
        if resume_from_checkpoint and file.is_file():
            self.state.stateful_callbacks.update(json.loads(file.read_text(encoding="utf-8")))  # type: ignore[union-attr]
        return epochs_and_steps

    def _load_callback_state(self) -> None:
        kept: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
        own = {key: kept.pop(key) for key in KEPT if key in kept}  # of a stock Trainer with a TrustRatioCallback
        super()._load_callback_state()
        kept.update(own)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            first = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
            raise CheckpointError(
                f"{resume_from_checkpoint} is of another model: {first.rstrip('.')}; {RESUME_AS_SAVED}"
            ) from None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As Trainer's, but for weights that are tied to one that was loaded: those are not missing."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        before = has_lamb_options(self.optimizer)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint} does not fit this run: {error}") from error
        if has_lamb_options(self.optimizer) and not before:  # torch's own optimizers take what they are given
            raise CheckpointError(f"{checkpoint} {NOT_LAMB}")


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
            open_briefly(file)
        except (OSError, ValueError, EOFError, UnpicklingError, zipfile.BadZipFile, SafetensorError) as error:
            return f"has a damaged {file.relative_to(checkpoint)} ({error})"
    return None


def open_briefly(file: Path) -> None:
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
    write_through(staged)
    if final.exists() or final.is_symlink():
        replaced = final.parent / REPLACED
        replaced.mkdir(exist_ok=True)  # what is open elsewhere cannot be deleted on some file systems
        move(final, replaced / final.name)
    move(staged, final)
    write_through(final.parent, recurse=False)
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
        write_through(target)
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
    write_through(source)
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


def write_through(folder: Path, recurse: bool = True) -> None:
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
