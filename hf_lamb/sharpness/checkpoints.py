"""Checkpoints and texts from disk, for `compare` and the command line. Needs transformers."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from hf_lamb.sharpness.objective import fixed_batches

__all__ = ["check_one_tokenizer", "has_tokenizer", "load_batches", "load_model", "one_tokenizer"]


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """The model of a checkpoint that `save_pretrained` or Trainer wrote, in float32 and eval mode.

    Raises ValueError, in one line, where there is none or where it lacks weights.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        architecture = (config.architectures or ["none named"])[0]
        kind = getattr(transformers, architecture, None)
        if kind is None:
            raise ValueError(f"its architecture is {architecture}, which transformers does not have")
        model, loading = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # files of all kinds are read, by several libraries
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{os.fspath(path)} cannot be loaded ({reason}): name a folder that save_pretrained or Trainer wrote"
        ) from None
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(
            f"{os.fspath(path)} lacks weights of {architecture} ({missing}), which would be random: name a checkpoint "
            "of the whole model"
        )
    model.eval()
    return model  # type: ignore[no-any-return]


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds one; transformers makes an empty one up where it does not."""
    return any(Path(folder).glob("*token*"))


def one_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every text the same ids."""

    def facts(tokenizer: PreTrainedTokenizerBase) -> Any:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        settings = json.loads(backend.to_str()) if backend is not None else {}
        for changes_with_use in ("truncation", "padding"):
            settings.pop(changes_with_use, None)
        return tokenizer.get_vocab(), tokenizer.special_tokens_map, settings

    return bool(facts(a) == facts(b))


def check_one_tokenizer(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> None:
    """Raise ValueError where two checkpoints have a tokenizer each, and not the same: their ids mean other tokens."""
    if any(os.path.isdir(path) and not has_tokenizer(path) for path in (a, b)):
        return
    tokenizers = [_tokenizer(os.fspath(path)) for path in (a, b)]
    if not one_tokenizer(*tokenizers):
        raise ValueError(
            f"{os.fspath(a)} and {os.fspath(b)} have different tokenizers, so that no text makes the same batches for "
            "both: compare checkpoints that were trained with one"
        )


def load_batches(
    data: str, checkpoint: str, model: nn.Module, rows: int, batch_size: int, max_length: int
) -> list[Any]:
    """Fixed batches for this model from a file: up to `rows` rows, evenly over it, with masks that never change.

    data: `.txt`, text for masked or causal language models; `.jsonl`, lines with "text", and "label" for models that
    classify sequences; `.pt`, a list of batches that `torch.save` wrote, taken as it is.

    Raises ValueError, in one line, for what cannot be read or does not suit the model.
    """
    path = Path(data)
    if path.suffix == ".pt":
        return _saved_batches(path)
    texts, labels = _texts(path)
    tokenizer = _tokenizer(checkpoint)
    longest = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    kind = type(model).__name__
    if "ForMaskedLM" in kind or "ForCausalLM" in kind or "LMHead" in kind:
        encoded = _blocks(texts, tokenizer, longest)
        masked = "ForMaskedLM" in kind
        collate: Any = DataCollatorForLanguageModeling(tokenizer, mlm=masked)
    elif "ForSequenceClassification" in kind:
        if labels is None:
            raise ValueError(f'{data}: a {kind} needs lines like {{"text": "...", "label": 1}}, in a .jsonl file')
        known = getattr(model.config, "label2id", {})
        encoded = [
            {**tokenizer(text, truncation=True, max_length=longest), "labels": known.get(label, label)}
            for text, label in zip(texts, labels, strict=True)
        ]
        collate = transformers.DataCollatorWithPadding(tokenizer)
    else:
        raise ValueError(f"no batches can be made of text for a {kind}: give --data as .pt batches")
    count = min(rows, len(encoded))
    batch_size = min(batch_size, count)
    return fixed_batches(encoded, batch_size, max(count // batch_size, 1), collate)


def _tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    try:
        if os.path.isdir(checkpoint) and not has_tokenizer(checkpoint):
            raise ValueError("no file of one")
        return AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # as above
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{checkpoint} has no tokenizer ({reason}): save it there too, or give --data as .pt batches"
        ) from None


def _saved_batches(path: Path) -> list[Any]:
    try:
        batches = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"cannot read {path} ({' '.join(str(error).split())[:200]}): write it with torch.save"
        ) from None
    if not isinstance(batches, list) or not batches:
        raise ValueError(f"{path} holds a {type(batches).__name__}: expected a list of batches that is not empty")
    return batches


def _texts(path: Path) -> tuple[list[str], list[Any] | None]:
    """(texts, labels), labels None where there are none."""
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"cannot read {path}: give a .txt, .jsonl or .pt file")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}): check the file") from None
    if path.suffix == ".txt":
        texts, labels = [line for line in content.split("\n") if line.strip()], None
    else:
        texts, found = [], []
        for number, line in enumerate(filter(str.strip, content.split("\n")), 1):
            try:
                row = json.loads(line)
                texts.append(str(row["text"]))
                found.append(row.get("label"))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f'{path}:{number} is no JSON with a "text": give lines like {{"text": "..."}}'
                ) from None
        labels = None if None in found else found
    if not texts:
        raise ValueError(f"{path} holds no text: name another")
    return texts, labels


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    """Rows of up to `length` ids with the tokenizer's special tokens; a text fills row after row.

    Lines are joined, because text wrapped to a width would else make rows of a few words.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(
        "\n".join(texts),
        truncation=True,
        max_length=length,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        padding="max_length",
    )
    names = ("input_ids", "attention_mask", "special_tokens_mask")
    return [{name: encoded[name][i] for name in names} for i in range(len(encoded["input_ids"]))]
