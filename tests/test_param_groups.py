"""Protects which parameters decay and which adapt, and that every one is optimised exactly once."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from hf_lamb import Lamb, lamb_param_groups


def by_flags(groups: list[dict]) -> dict[tuple[bool, bool], set[str]]:
    return {(g["weight_decay"] > 0, g["layer_adaptation"]): {name for name, _ in g["params"]} for g in groups}


@pytest.fixture
def bert() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )


def test_bert_biases_and_layer_norms_neither_decay_nor_adapt(bert: BertForMaskedLM) -> None:
    groups = by_flags(lamb_param_groups(bert))
    assert set(groups) == {(True, True), (False, False)}
    assert "bert.embeddings.word_embeddings.weight" in groups[True, True]
    assert "bert.encoder.layer.0.attention.self.query.weight" in groups[True, True]
    assert all(name.endswith("bias") or "LayerNorm" in name for name in groups[False, False])
    assert not any(name.endswith("bias") or "LayerNorm" in name for name in groups[True, True])


def test_every_trainable_parameter_exactly_once_tied_ones_too(bert: BertForMaskedLM) -> None:
    """BERT ties its output matrix and bias; a frozen parameter is left out."""
    bert.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    grouped = [param for group in lamb_param_groups(bert) for _, param in group["params"]]
    trainable = {id(p) for p in bert.parameters() if p.requires_grad}
    assert len(grouped) == len(trainable)
    assert {id(p) for p in grouped} == trainable


class Odd(nn.Module):
    """Names and shapes that a rule by ndim or by name alone gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))  # 1-D, and neither a bias nor a norm: LayerScale
        self.norm_free = nn.Linear(4, 4)  # "norm" in its name, not in its type
        self.final = nn.RMSNorm(4)  # a norm whose name does not say so
        self.batch = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2)  # in_proj_bias
        self.relative_attention_bias = nn.Embedding(8, 2)  # T5: a table, not a bias


def test_by_type_and_name_never_by_ndim() -> None:
    groups = by_flags(lamb_param_groups(Odd()))
    assert groups[True, True] == {
        "scale",
        "norm_free.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "relative_attention_bias.weight",
    }
    assert groups[False, False] == {
        "norm_free.bias",
        "final.weight",
        "batch.weight",
        "batch.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    }


def test_adapt_all_adapts_what_does_not_decay() -> None:
    """NVLAMB's and optax's way: the exclusion is from decay only."""
    groups = by_flags(lamb_param_groups(Odd(), adapt_all=True))
    assert set(groups) == {(True, True), (False, True)}
    assert "final.weight" in groups[False, True]


def test_patterns_exclude_more() -> None:
    """Decay and adaptation are separate switches; what is excluded by rule stays excluded."""
    groups = by_flags(
        lamb_param_groups(
            Odd(), exclude_from_weight_decay=["^scale$"], exclude_from_layer_adaptation=["relative_attention"]
        )
    )
    assert groups[False, True] == {"scale"}
    assert groups[True, False] == {"relative_attention_bias.weight"}
    assert "final.weight" in groups[False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude_from_weight_decay": ["embeddings?"]}, r"exclude_from_weight_decay: 'embeddings\?' matches no"),
        ({"exclude_from_layer_adaptation": ["sclae"]}, "exclude_from_layer_adaptation: 'sclae' matches no"),
        ({"exclude_from_weight_decay": ["("]}, r"'\(' is no regular expression"),
    ],
)
def test_a_pattern_that_does_nothing_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lamb_param_groups(Odd(), **options)


def test_a_model_without_trainable_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        lamb_param_groups(nn.Linear(2, 2).requires_grad_(False))


def test_groups_are_named_never_empty_and_lamb_takes_them(bert: BertForMaskedLM) -> None:
    """torch.distributed.checkpoint allows one empty group at most; names come back in layer_stats."""
    groups = lamb_param_groups(bert, weight_decay=0.1)
    assert [g["name"] for g in groups] == ["decay, adapt", "no_decay, no_adapt"]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    optimizer = Lamb(groups)
    bert(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, -100, 3]])).loss.backward()
    optimizer.step()
    stats = optimizer.layer_stats()
    assert set(stats) <= {name for name, _ in bert.named_parameters()}
    assert stats["bert.embeddings.LayerNorm.weight"].trust_ratio == 1.0
    assert len(lamb_param_groups(nn.Linear(2, 2, bias=False))) == 1
