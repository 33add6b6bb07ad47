"""The model card of a run with a large batch: optimizer, batch, learning rate, schedule, plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import has_length

from hf_lamb._version import __version__
from hf_lamb.files import atomic_write
from hf_lamb.trainer.callbacks import find_lamb

if TYPE_CHECKING:
    from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["args_in_force", "complete_model_card", "options_in_force"]


# transformers writes this for a model that was trained from scratch.
EMPTY_BASE_MODEL = "is a fine-tuned version of [](https://huggingface.co/)"


def options_in_force(optimizer: Any) -> dict[str, Any]:
    """Return the options that an optimizer really uses, for records of a run.

    A resumed run uses the options of its checkpoint, not those of its command line.

    Args:
        optimizer: any torch optimizer; accelerate may have wrapped it.

    Returns:
        "learning_rate" (the schedule's peak) and "weight_decay", each the largest of all groups; the other options of
        the first group under their own names, such as "betas" and "eps"; "split" if the model has fused parameters:
        whether any of them is several layers.
    """
    groups = options_of_groups(optimizer)
    options = dict(groups[0])
    if any("split" in group for group in groups):
        options["split"] = any(group.get("split") for group in groups)
    for name in ("learning_rate", "weight_decay"):
        options[name] = max((float(group[name]) for group in groups if group.get(name) is not None), default=0.0)
    return options


def options_of_groups(optimizer: Any) -> list[dict[str, Any]]:
    """Return the options of each group as plain values: "learning_rate" is the schedule's peak, "split" is whether."""
    own = {"params", "param_names", "name", "lr", "initial_lr", "undecayed", "unadapted", "unfixed", "split"}
    return [
        {name: _plain(value) for name, value in group.items() if name not in own}
        | {"learning_rate": _plain(group.get("initial_lr", group.get("lr")))}
        | ({"split": bool(group["split"])} if "split" in group else {})
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part) for part in value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def complete_model_card(trainer: LambTrainer) -> None:
    """Fill in sections of the card that Trainer wrote, and add the section "Large batch" if the optimizer is LAMB."""
    card = Path(str(trainer.args.output_dir), "README.md")
    text = card.read_text(encoding="utf-8").replace(EMPTY_BASE_MODEL, "was trained from scratch")
    for heading, words in {**_known_sections(trainer), **trainer.card_sections}.items():
        text = text.replace(f"## {heading}\n\nMore information needed\n", f"## {heading}\n\n{words}\n")
    if total := _rows_in_words(trainer.train_dataset):
        text = text.replace(" on an unknown dataset.", f" on {total}.")
    if lines := _large_batch(trainer):
        text = text.rstrip("\n") + "\n\n## Large batch\n\n" + "\n".join(lines) + "\n"
    with atomic_write(card) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def args_in_force(trainer: LambTrainer) -> TrainingArguments:
    """Return a copy of the arguments with the options in force, for the hyperparameters in Trainer's model card."""
    args = copy.copy(trainer.args)
    args.optim = str(getattr(args.optim, "value", args.optim))  # else the card has "OptimizerNames.LAMB"
    args.per_device_train_batch_size = trainer.sequences_at_once() // args.world_size // max(1, args.n_gpu)
    if trainer.staged is not None:
        args.gradient_accumulation_steps = trainer.staged.in_force.accumulation
    if trainer.optimizer is None:
        return args
    options = options_in_force(trainer.optimizer)
    args.learning_rate = options["learning_rate"]
    if find_lamb(trainer.optimizer) is not None:
        args.optim_args = _chosen(options)
    elif "eps" in options and "betas" in options:
        (args.adam_beta1, args.adam_beta2), args.adam_epsilon = options["betas"], options["eps"]
    return args


def _known_sections(trainer: LambTrainer) -> dict[str, str]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    size = ""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        size = f" with {sum(param.numel() for param in model.parameters()):,} parameters"
    sections = {"Model description": f"{type(model).__name__}{size}."}
    if trained := _rows_in_words(trainer.train_dataset):
        evaluated = _rows_in_words(trainer.eval_dataset)
        sections["Training and evaluation data"] = (
            f"Trained on {trainer.dataset_name + ', ' if trainer.dataset_name else ''}{trained}"
            f"{f', evaluated on {evaluated}' if evaluated else ''}."
        )
    return sections


def _large_batch(trainer: LambTrainer) -> list[str]:
    args, lamb = trainer.args, find_lamb(trainer.optimizer)
    if lamb is None:
        return []
    options = options_in_force(trainer.optimizer)
    rows = trainer.sequences_at_once() // args.world_size
    split = f"{rows} x {args.gradient_accumulation_steps} accumulation steps x {args.world_size}"
    batch = f"{trainer.get_total_train_batch_size(args):,} sequences = {split} processes"
    if trainer.staged is not None:
        words = trainer.staged.in_words(trainer.state.max_steps)
        batch = f"{words}; {rows} sequences at a time on each of {args.world_size} processes"
    power = getattr(args, "decay_power", None)
    decay = f"polynomial, power {power:g}" if power else SchedulerType(args.lr_scheduler_type).value
    warmup = args.get_warmup_steps(trainer.state.max_steps)
    rate = f"learning rate {options['learning_rate']:.4g}"
    why = trainer.learning_rate_why or ""
    lines = [
        f"- optimizer: LAMB (https://arxiv.org/abs/1904.00962), hf_lamb {__version__}: {_chosen(options)}",
        f"- weight decay: {options['weight_decay']:g}, not of biases and norms",
        f"- global batch: {batch}",
        f"- {why if why.startswith(f'{rate} = ') else rate}",
        f"- steps: {trainer.state.max_steps:,}, {warmup:,} of them warm-up; decay: {decay}",
        f"- gradients clipped to: {f'{args.max_grad_norm:g}' if args.max_grad_norm else 'not clipped'}",
    ]
    if "split" in options:
        of_each = [len(sizes) for group in lamb.param_groups for _, sizes in group.get("split", ())]
        known = f"{len(of_each)} hold {sum(of_each)} layers, each with a trust ratio of its own"
        lines.append(f"- fused parameters: {known if of_each else 'each is one layer (split=False)'}")
    return lines + ([f"- plan: {trainer.plan}"] if trainer.plan else [])


def _rows_in_words(dataset: Any) -> str:
    return f"{len(dataset):,} rows" if has_length(dataset) and not isinstance(dataset, dict) else ""


def _chosen(options: dict[str, Any]) -> str:
    names = ("betas", "eps", "bias_correction", "min_trust_ratio", "max_trust_ratio", "max_grad_norm")
    return ", ".join(f"{name}={options[name]}" for name in names if options[name] is not None)
