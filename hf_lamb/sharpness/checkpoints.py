"""Loads checkpoints and texts, for `compare` and the command line. Needs transformers."""

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

from hf_lamb.command_line import one_line
from hf_lamb.sharpness.objective import fixed_batches

__all__ = ["check_one_tokenizer", "has_tokenizer", "load_batches", "load_model", "one_tokenizer"]


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """Load the model of a checkpoint that `save_pretrained` or Trainer wrote, in float32 and eval mode.

    Raises:
        ValueError: there is no model, or weights are missing.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        architecture = (config.architectures or ["none named"])[0]
        kind = getattr(transformers, architecture, None)
        if kind is None:
            raise ValueError(f"its architecture is {architecture}, which transformers does not have")
        model, loading = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # several libraries read these files and raise different errors
        reason = one_line(error)
        raise ValueError(
            f"{os.fspath(path)} cannot be loaded ({reason}): give a folder that save_pretrained or Trainer wrote"
        ) from None
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(
            f"{os.fspath(path)} lacks weights of {architecture} ({missing}): give a checkpoint of the whole model"
        )
    model.eval()
    return model  # type: ignore[no-any-return]


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder has a tokenizer. Without one transformers would create an empty tokenizer."""
    return any(Path(folder).glob("*token*"))


def one_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers give every text the same ids."""

    def facts(tokenizer: PreTrainedTokenizerBase) -> Any:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        settings = json.loads(backend.to_str()) if backend is not None else {}
        for changes_with_use in ("truncation", "padding"):
            settings.pop(changes_with_use, None)
        return tokenizer.get_vocab(), tokenizer.special_tokens_map, settings

    return bool(facts(a) == facts(b))


def check_one_tokenizer(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> None:
    """Raise ValueError if two checkpoints have different tokenizers: their ids then mean different tokens."""
    if any(os.path.isdir(path) and not has_tokenizer(path) for path in (a, b)):
        return
    tokenizers = [_tokenizer(os.fspath(path)) for path in (a, b)]
    if not one_tokenizer(*tokenizers):
        raise ValueError(
            f"{os.fspath(a)} and {os.fspath(b)} have different tokenizers, so a text gives different batches: compare "
            "checkpoints that were trained with the same tokenizer"
        )


def load_batches(
    data: str, checkpoint: str, model: nn.Module, rows: int, batch_size: int, max_length: int
) -> list[Any]:
    """Make fixed batches for a model from a file, with constant masks.

    Args:
        data: a `.txt` file with text, for masked or causal language models; a `.jsonl` file with lines that have
            "text", and "label" for models that classify sequences; or a `.pt` file with a list of batches from
            `torch.save`, which is used as it is.
        checkpoint: the folder with the tokenizer.
        model: the model; its class decides what the batches are.
        rows: the largest number of rows, taken evenly from the file.
        batch_size: rows per batch.
        max_length: tokens per row.

    Raises:
        ValueError: the file cannot be read or does not suit the model.
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
            raise ValueError(f'{data}: give a .jsonl file with lines like {{"text": "...", "label": 1}} for a {kind}')
        known = getattr(model.config, "label2id", {})
        encoded = [
            {**tokenizer(text, truncation=True, max_length=longest), "labels": known.get(label, label)}
            for text, label in zip(texts, labels, strict=True)
        ]
        collate = transformers.DataCollatorWithPadding(tokenizer)
    else:
        raise ValueError(f"give --data as .pt batches: text cannot be turned into batches for a {kind}")
    count = min(rows, len(encoded))
    batch_size = min(batch_size, count)
    return fixed_batches(encoded, batch_size, max(count // batch_size, 1), collate)


def _tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    try:
        if os.path.isdir(checkpoint) and not has_tokenizer(checkpoint):
            raise ValueError("no file of one")
        return AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # as above
        reason = one_line(error)
        raise ValueError(
            f"{checkpoint} has no tokenizer ({reason}): save it there too, or give --data as .pt batches"
        ) from None


def _saved_batches(path: Path) -> list[Any]:
    try:
        batches = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read {path} ({one_line(error)[:200]}): write it with torch.save") from None
    if not isinstance(batches, list) or not batches:
        raise ValueError(f"{path} holds a {type(batches).__name__}: expected a list of batches that is not empty")
    return batches


def _texts(path: Path) -> tuple[list[str], list[Any] | None]:
    """Return texts and labels; the labels are None if there are none."""
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
        raise ValueError(f"{path} holds no text: give another file")
    return texts, labels


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    """Cut texts into rows of up to `length` ids, with the tokenizer's special tokens.

    The lines are joined first: otherwise text that is wrapped to a width would give rows of a few words.
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
