"""Any masked LM of transformers, which computes logits only where there is a label."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass
class MaskedGuesses(ModelOutput):
    """The loss, and when evaluating the likeliest token of every masked position (-100 elsewhere, [batch, length])."""

    loss: torch.Tensor | None = None
    guesses: torch.Tensor | None = None


def compute_logits_at_labels(model: PreTrainedModel) -> None:
    """Make a masked LM, given labels, compute logits at the labelled positions only and return `MaskedGuesses`.

    Hooks cut the output of the base model, and the labels, down to these positions. A masked-LM head and its loss,
    both the model's own, treat every position alike, so loss and gradients stay the same. The class and the
    configuration stay as they are, and so does what is saved. A model that is its own base computes all logits.
    """
    model.register_forward_pre_hook(_take_labels, with_kwargs=True)
    if model.base_model is not model:
        model.base_model.register_forward_hook(_keep_labelled)
    model.register_forward_hook(_to_guesses)


def _take_labels(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Keep the labels at the base model, which each of DataParallel's replicas has for itself."""
    labels = kwargs.get("labels")
    base = model.base_model
    base.labels = labels
    if labels is not None and base is not model:
        kwargs = {**kwargs, "labels": labels[labels != IGNORED][None]}
    return args, kwargs


def _keep_labelled(base: Any, args: Any, output: Any) -> Any:
    labels = base.labels
    if labels is None:
        return output
    hidden = output[0]
    if hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"{type(base).__name__} gives {tuple(hidden.shape[:2])} vectors for {tuple(labels.shape)} tokens: this "
            "recipe trains encoders with one for each token"
        )
    hidden = hidden[labels != IGNORED][None]
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output[next(iter(output))] = hidden
    return output


def _to_guesses(model: Any, args: Any, output: Any) -> Any:
    labels, model.base_model.labels = model.base_model.labels, None
    if labels is None:
        return output
    loss, logits = output[:2]
    if model.training:
        return MaskedGuesses(loss=loss)
    masked, best = labels != IGNORED, logits.argmax(dim=-1)
    if best.shape == labels.shape:
        return MaskedGuesses(loss=loss, guesses=best.where(masked, IGNORED))
    return MaskedGuesses(loss=loss, guesses=labels.masked_scatter(masked, best))
