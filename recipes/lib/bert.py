"""BERT in named sizes, which computes logits only where they are needed."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import BertConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import MaskedLMOutput

from recipes.lib.labelled import MaskedGuesses

# Devlin et al. 2018 (base, large) and Turc et al. 2019 (tiny, mini). The small ones have no dropout: they underfit.
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    "micro": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
    "mini": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
}


class BertForMaskedLM(transformers.BertForMaskedLM):  # type: ignore[no-untyped-call]
    """transformers' BERT whose output layer, given labels, sees the masked positions only.

    The loss is the same mean over the masked positions, for 15 % of the work in the layer that dominates small
    models. What it saves loads with `AutoModelForMaskedLM`.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedGuesses | MaskedLMOutput:
        if labels is None:
            output: MaskedLMOutput = super().forward(input_ids, attention_mask, **kwargs)
            return output
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        masked = labels != -100
        logits = self.cls(hidden[masked]).float()
        loss = nn.functional.cross_entropy(logits, labels[masked])
        if self.training:
            return MaskedGuesses(loss=loss)
        return MaskedGuesses(loss=loss, guesses=labels.masked_scatter(masked, logits.argmax(dim=-1)))


def new_bert(
    size: str, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, attn_implementation: str | None = None
) -> BertForMaskedLM:
    """A freshly initialised BERT of a named size for this tokenizer and sequence length."""
    others: dict[str, Any] = {"attn_implementation": attn_implementation}
    if size not in ("base", "large"):
        others |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=max_seq_length,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES[size],
        **others,
    )
    return BertForMaskedLM(config)
