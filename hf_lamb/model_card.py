"""What a model card says of a run with a large batch: optimizer, batch, rate, schedule, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import SchedulerType, Trainer

from hf_lamb._version import __version__
from hf_lamb.callbacks import find_lamb
from hf_lamb.files import replacing

__all__ = ["ModelCardTrainer", "options_in_force"]


# What transformers writes of a model without a name, where it means the other.
OF_NOTHING = "is a fine-tuned version of [](https://huggingface.co/)"


def options_in_force(optimizer: Any) -> dict[str, Any]:
    """What an optimizer, also one that accelerate has wrapped, trains with, whatever `args` say: for records.

    A resumed run goes on with the options of its checkpoint, not with those of its command line.

    Returns:
        "learning_rate", at the schedule's peak, and "weight_decay", each the largest of all groups', and the other
        options of the first group under their own names, such as "betas" and "eps".
    """
    groups = [{**group, "learning_rate": group.get("initial_lr", group.get("lr"))} for group in optimizer.param_groups]
    own = {"params", "param_names", "name", "lr", "initial_lr", "undecayed", "unadapted"}
    options = {name: value for name, value in groups[0].items() if name not in own}
    for name in ("learning_rate", "weight_decay"):
        options[name] = max((float(group[name]) for group in groups if group.get(name) is not None), default=0.0)
    return options


class ModelCardTrainer(Trainer):
    """`transformers.Trainer` whose model card, also that of `push_to_hub`, names what a large-batch run depends on.

    plan: a plan's name and phase, for the card; default none.
    """

    plan: str | None = None
    learning_rate_why: str | None = None  # where the rate follows from another batch's: how

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the section "Large batch" where the optimizer is LAMB."""
        super().create_model_card(*args, **kwargs)
        lines = self._large_batch()
        if lines and self.is_world_process_zero():
            card = Path(str(self.args.output_dir), "README.md")
            text = card.read_text(encoding="utf-8").replace(OF_NOTHING, "was trained from scratch")
            text = text.rstrip("\n") + "\n\n## Large batch\n\n" + "\n".join(lines) + "\n"
            with replacing(card) as unfinished:
                unfinished.write_text(text, encoding="utf-8")

    def _large_batch(self) -> list[str]:
        args, lamb = self.args, find_lamb(self.optimizer)
        if lamb is None:
            return []
        batch = self.get_total_train_batch_size(args)
        split = f"{self._train_batch_size} x {args.gradient_accumulation_steps} accumulation steps x {args.world_size}"
        options = ("betas", "eps", "bias_correction", "min_trust_ratio", "max_trust_ratio", "max_grad_norm")
        group = lamb.param_groups[0]
        chosen = ", ".join(f"{name}={group[name]}" for name in options if group[name] is not None)
        power = getattr(args, "decay_power", None)
        decay = f"polynomial, power {power:g}" if power else SchedulerType(args.lr_scheduler_type).value
        warmup = args.get_warmup_steps(self.state.max_steps)
        lines = [
            f"- optimizer: LAMB (https://arxiv.org/abs/1904.00962), hf_lamb {__version__}: {chosen}",
            f"- weight decay: {args.weight_decay:g}, not of biases and norms",
            f"- global batch: {batch:,} sequences = {split} processes",
            f"- {self.learning_rate_why or f'learning rate {args.learning_rate:g}'}",
            f"- steps: {self.state.max_steps:,}, {warmup:,} of them warm-up; decay: {decay}",
            f"- gradients clipped to: {f'{args.max_grad_norm:g}' if args.max_grad_norm else 'not clipped'}",
        ]
        return lines + ([f"- plan: {self.plan}"] if self.plan else [])
