"""Which model is pretrained: BERT in a named size, any masked LM of transformers, or one that trains on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_lamb.command_line import one_line
from hf_lamb.scaling import did_you_mean
from recipes.lib.bert import SIZES, new_bert
from recipes.lib.labelled import compute_logits_at_labels

# What a configuration says of the tokenizer.
SPECIAL_IDS = tuple(f"{name}_token_id" for name in ("pad", "cls", "sep", "mask", "bos", "eos"))

# What a configuration says of files and of how it was saved.
NOT_OF_THE_MODEL = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"}


@dataclass
class ModelArguments:
    """Which model is pretrained; the names, but for `size`, are those of transformers' run_mlm.py."""

    size: str | None = field(
        default=None, metadata={"help": "The BERT of 2018 in a named size.", "choices": list(SIZES)}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "In place of --size: a checkpoint of a masked LM that trains on, a folder or a hub name. The "
            "tokenizer is its own."
        },
    )
    model_type: str | None = field(
        default=None,
        metadata={
            "help": "In place of --size: a new model of this architecture, such as modernbert or roberta, with "
            "transformers' default numbers; its vocabulary is the tokenizer's."
        },
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "In place of --size: a new model of this configuration, a folder, a file or a hub name."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Other numbers for --model_type: num_hidden_layers=4,hidden_size=256,..."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flash_attention_2, ...; default: what transformers chooses for the model."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError for options that contradict one another."""
        given = [name for name in ("size", "model_name_or_path", "model_type", "config_name") if getattr(self, name)]
        if len(given) > 1:
            one, other = given[:2]
            raise ValueError(
                f"--{one} {getattr(self, one)} and --{other} {getattr(self, other)}: give one of them, each names a "
                "model of its own"
            )
        if self.config_overrides is not None and self.model_type is None:
            raise ValueError(
                f"--config_overrides {self.config_overrides}: it changes the numbers of --model_type: give that, or "
                "write them into a file for --config_name"
            )
        if not given:
            self.size = "tiny"

    @property
    def model_name(self) -> str:
        """How the model is called in titles and folders."""
        if self.size is not None:
            return f"BERT-{self.size}"
        return self.model_type or Path(self.model_name_or_path or self.config_name or "").absolute().name


def model_config(arguments: ModelArguments) -> PreTrainedConfig | None:
    """The configuration that the options name, before it is fitted to a tokenizer; None for a named size.

    Raises ValueError for one that cannot be loaded, or is not that of an encoder with a masked-LM head.
    """
    if arguments.size is not None:
        return None
    if (kind := arguments.model_type) is not None:
        if kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            known = list(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
            raise ValueError(
                f"--model_type {kind}{did_you_mean(kind, known)}: transformers has no masked LM of this type: "
                f"expected one of {', '.join(known)}"
            )
        config = _overridden(CONFIG_MAPPING[kind], arguments.config_overrides)
    else:
        option, name = _named(arguments)
        try:
            config = AutoConfig.from_pretrained(name)
        except Exception as error:  # files of all kinds are read, by several libraries
            raise ValueError(
                f"{option} {name} cannot be loaded ({_reason(error)}): name a folder that save_pretrained wrote, or a "
                "model of the hub that can be reached"
            ) from None
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:
        raise ValueError(
            f"{' '.join(_named(arguments))} is of type {config.model_type}, which is no encoder with a masked-LM head "
            "in transformers: name one such as bert, roberta or modernbert"
        )
    return config


def _overridden(kind: type[PreTrainedConfig], overrides: str | None) -> PreTrainedConfig:
    """A configuration with other numbers than the defaults, and what follows from them."""
    if overrides is None:
        return kind()
    try:
        typed = kind()
        typed.update_from_string(overrides)
        names = [item.partition("=")[0] for item in overrides.split(",")]
        return kind(**{name: getattr(typed, name) for name in names})
    except Exception as error:  # some configurations check themselves, with errors of their own
        raise ValueError(
            f"--config_overrides {overrides} ({_reason(error)}): give name=value,name=value with names of "
            f"{kind.__name__}"
        ) from None


def fit(
    arguments: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> None:
    """Write the tokenizer's facts into the configuration of a new model; check those of a checkpoint, and the length.

    Raises ValueError where tokenizer or sequences do not fit the model.
    """
    tokens = 1 + max(tokenizer.get_vocab().values())
    named = " ".join(_named(arguments))
    whose = f"the tokenizer {tokenizer.name_or_path} "
    if arguments.model_name_or_path is None:
        if "vocab_size=" not in (arguments.config_overrides or "") and arguments.model_type is not None:
            config.vocab_size = tokens
        for name in SPECIAL_IDS:
            if hasattr(config, name):
                setattr(config, name, getattr(tokenizer, name))
    elif config.pad_token_id is not None and config.pad_token_id != tokenizer.pad_token_id:
        raise ValueError(
            f"{whose}pads with id {tokenizer.pad_token_id}, {named} with {config.pad_token_id}: leave "
            "--tokenizer_name out, or name the tokenizer that the model was trained with"
        )
    if tokens > config.vocab_size:
        remedy = {
            "model_name_or_path": "leave --tokenizer_name out, or name the tokenizer that the model was trained with",
            "model_type": f"leave vocab_size out of --config_overrides, or write vocab_size={tokens}",
            "config_name": f'write "vocab_size": {tokens} there, or lower --vocab_size',
        }[_named(arguments)[0][2:]]
        raise ValueError(f"{whose}has {tokens} tokens, {named} embeddings for {config.vocab_size}: {remedy}")
    with _building(arguments):
        most = longest_sequence(config)
    if most is not None and max_seq_length > most:
        more = getattr(config, "max_position_embeddings", most) - most + max_seq_length
        remedy = "" if arguments.model_name_or_path else f", or set max_position_embeddings to {more} or more"
        raise ValueError(
            f"--max_seq_length {max_seq_length}: {named} has positions for {most} tokens: lower it{remedy}"
        )


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model has positions for; None where it sets no limit.

    RoBERTa and its kin number their positions from the padding's id + 1 on, so that they have fewer than rows.
    """
    with torch.device("meta"):
        kind: Any = MODEL_FOR_MASKED_LM_MAPPING[type(config)]
        model = kind(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position_embeddings" in name and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return getattr(config, "max_position_embeddings", None)


def new_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> PreTrainedModel:
    """The model to train, fitted to this tokenizer and sequence length, in float32.

    Raises ValueError for what `model_config` and `fit` refuse, and for a checkpoint that lacks weights.
    """
    config = model_config(arguments)
    if config is not None:
        fit(arguments, config, tokenizer, max_seq_length)
    option, name = _named(arguments)
    attention, missing = arguments.attn_implementation, []
    options: dict[str, Any] = {"config": config, "dtype": torch.float32, "attn_implementation": attention}
    with _building(arguments):
        if config is None:
            return new_bert(name, tokenizer, max_seq_length, attention)
        if arguments.model_name_or_path is None:
            model = AutoModelForMaskedLM.from_config(**options)  # type: ignore[no-untyped-call]
        else:
            model, loading = AutoModelForMaskedLM.from_pretrained(name, output_loading_info=True, **options)
            missing = sorted(loading["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{option} {name} has no weights for {', '.join(missing[:3])}{more} of {type(model).__name__}: give a "
            "checkpoint that was saved with its masked-LM head"
        )
    compute_logits_at_labels(model)
    return model  # type: ignore[no-any-return]


@contextmanager
def _building(arguments: ModelArguments) -> Iterator[None]:
    """Raise ValueError, of one line, for whatever transformers raises in this block."""
    try:
        yield
    except Exception as error:  # configurations, files and attention all have errors of their own
        given = {name: getattr(arguments, name) for name in ("config_overrides", "attn_implementation")}
        options = [" ".join(_named(arguments)), *(f"--{name} {value}" for name, value in given.items() if value)]
        raise ValueError(
            f"{' '.join(options)}: transformers cannot build this model ({_reason(error)}): change one of these"
        ) from None


def check_same_model(checkpoint: str, model: PreTrainedModel) -> None:
    """Raise ValueError where a checkpoint's configuration is of another model than this one."""
    file = Path(checkpoint, "config.json")
    if not file.is_file():  # sharded checkpoints have none; their shapes are compared when they are loaded
        return
    theirs, own = json.loads(file.read_text()), model.config.to_dict()
    for name in ("model_type", *sorted(theirs.keys() & own.keys() - NOT_OF_THE_MODEL)):
        # As JSON, which has lists for tuples, and text for the keys of mappings.
        if theirs.get(name) != (mine := json.loads(json.dumps(own.get(name), default=str))):
            raise ValueError(
                f"{checkpoint} is of another model: its {name} is {theirs.get(name)}, this run's {mine}: resume with "
                "the options it was saved with, or name another --output_dir"
            )


def _named(arguments: ModelArguments) -> tuple[str, str]:
    """The option that names the model, and its value."""
    for name in ("model_name_or_path", "model_type", "config_name", "size"):
        if value := getattr(arguments, name):
            return f"--{name}", value
    raise AssertionError


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
