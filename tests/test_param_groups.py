"""Protects which parameters decay and which adapt, and that every one is optimised exactly once."""

import re

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, BertConfig, BertForMaskedLM, Trainer

from hf_lamb import Lamb, lamb_param_groups


def by_flags(groups: list[dict]) -> dict[tuple[bool, bool], set[str]]:
    return {(g["weight_decay"] > 0, g["layer_adaptation"]): set(g["param_names"]) for g in groups}


def unadapted(model: nn.Module) -> set[str]:
    return {
        name for group in lamb_param_groups(model) if not group["layer_adaptation"] for name in group["param_names"]
    }


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
    grouped = [param for group in lamb_param_groups(bert) for param in group["params"]]
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
        self.grid = nn.LayerNorm((4, 4))  # a norm of two dimensions
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)  # in_proj_bias, bias_k, bias_v
        self.relative_attention_bias = nn.Embedding(8, 2)  # T5: a table of biases
        self.bias_conv = nn.Conv1d(4, 4, 3)  # UnivNet: computes biases, a matrix


def test_by_type_and_name_never_by_ndim() -> None:
    """Trainer lets norms decay whose type and name it does not know; they do not adapt all the same."""
    groups = by_flags(lamb_param_groups(Odd()))
    assert groups[True, True] == {
        "scale",
        "norm_free.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert groups[True, False] == {"final.weight", "batch.weight"}
    assert groups[False, True] == {"bias_conv.weight"}
    assert groups[False, False] == {
        "norm_free.bias",
        "batch.bias",
        "grid.weight",
        "grid.bias",
        "attention.in_proj_bias",
        "attention.bias_k",
        "attention.bias_v",
        "attention.out_proj.bias",
        "relative_attention_bias.weight",
        "bias_conv.bias",
    }


def test_biases_of_recurrent_networks_neither_decay_nor_adapt() -> None:
    """torch names them bias_ih_l0_reverse; their matrices do both."""
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(4, 4, num_layers=2, bidirectional=True, proj_size=2),
            "gru": nn.GRU(4, 4),
            "rnn": nn.RNN(4, 4),
            "cell": nn.LSTMCell(4, 4),
        }
    )
    groups = by_flags(lamb_param_groups(model))
    assert set(groups) == {(True, True), (False, False)}
    assert all(".bias_" in name for name in groups[False, False])
    assert all(".weight_" in name for name in groups[True, True])


class LayerNormLinear(nn.Module):
    """As in Transformer Engine: a norm and a matrix in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.ones(4))
        self.layer_norm_bias = nn.Parameter(torch.ones(4))
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.bias = nn.Parameter(torch.ones(4))


class NormedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9, 4))


class NormedLinear(nn.Linear):
    """Not a norm, even with one row."""


class CohereLayerNorm(nn.Module):
    """A gain for each head and channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))


class ScaleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(()))


class GlobalGRN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 1, 4))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (LayerNormLinear(), {"layer_norm_weight", "layer_norm_bias", "bias"}),
        (NormedEmbedding(), set()),
        (NormedLinear(4, 1), {"bias"}),
        (CohereLayerNorm(), {"weight"}),
        (ScaleNorm(), {"g"}),
        (GlobalGRN(), {"weight"}),
        (nn.LazyBatchNorm1d(), {"weight", "bias"}),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), {"bias"}),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), {"bias"}),
        (nn.utils.parametrize.register_parametrization(nn.LayerNorm(4), "weight", nn.Identity()), None),
        (nn.ParameterDict({"bias_b": nn.Parameter(torch.ones(4)), "w": nn.Parameter(torch.ones(4))}), {"bias_b"}),
        (nn.ModuleDict({"x": nn.ParameterDict({"w": nn.Parameter(torch.ones(4))})}), set()),
        (nn.ModuleDict({"biases": nn.ParameterList([nn.Parameter(torch.ones(4))])}), {"biases.0"}),
        (nn.ModuleDict({"rel_pos_bias": nn.Linear(8, 2, bias=False)}), {"rel_pos_bias.weight"}),
        (nn.ModuleDict({"rel_pos_bias": nn.Linear(8, 2)}), {"rel_pos_bias.bias"}),
        (nn.ModuleDict({"position_bias_mlp": nn.Sequential(nn.Linear(2, 8, bias=False))}), set()),
        (nn.ModuleDict({"user_bias": nn.Embedding(8, 1)}), {"user_bias.weight"}),
        (nn.ModuleDict({"position_embeddings": nn.Embedding(8, 2)}), set()),
    ],
)
def test_a_real_matrix_always_adapts_and_a_norm_never(module: nn.Module, expected: set[str] | None) -> None:
    """By what the module is; None: all of it is left out."""
    assert unadapted(module) == ({name for name, _ in module.named_parameters()} if expected is None else expected)


# ---- The models of transformers -------------------------------------------------------------------------------------

FAMILIES = (
    "bert t5 mpnet xlnet deberta-v2 modernbert llama gpt2 mamba convnextv2 swin swinv2 beit levit layoutlmv3 clip "
    "wav2vec2-conformer wavlm resnet"
)
# Matrices by their shape that are no layers: biases of heads, of experts and of positions.
TABLES = re.compile(
    r"(?:^|\.)(?:relative_attention_bias|rel_pos_bias|rel_pos_[xy]_bias|bias_values|rel_attn_embed)\.weight$"
    r"|(?:^|\.)(?:attention_biases|relative_position_bias_table|relative_attention_bias|position_bias|pos_bias_[uv]"
    r"|bias_[uv]|r_[rsw]_bias|e_score_correction_bias|(?:gate_up|down|dt)_proj_bias|(?:input|recurrent)_gate_bias)$"
    r"|(?:q_norm|k_norm|q_layernorm|k_layernorm)\.weight$"
    r"|key_conv_attn_layer\.bias$"
)


def model_on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[kind]())
    assert isinstance(model, nn.Module)
    return model


def check_rules(model: nn.Module) -> None:
    """Decay is Trainer's own; adaptation is stated anew, by shapes, which a whole model has."""
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type] - no state is looked at
    flags = {
        name: (group["weight_decay"] > 0, group["layer_adaptation"])
        for group in lamb_param_groups(model)
        for name in group["param_names"]
    }
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert flags.keys() == shapes.keys()
    assert {name for name, (decays, _) in flags.items() if decays} == decaying & flags.keys()
    for name, (_, adapts) in flags.items():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        is_matrix = sum(length > 1 for length in shapes[name]) > 1
        if is_matrix:
            left_out = bool(TABLES.search(name))
        else:
            last = name.rpartition(".")[2]
            is_normalisation = bool(re.search("norm|grn", owner.lower()))
            left_out = "bias" in last or is_normalisation
        assert adapts != left_out, f"{name} of {owner} {tuple(shapes[name])}: adapts {adapts}"


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES.split() if kind in CONFIG_MAPPING])
def test_decay_is_trainers_and_only_biases_tables_and_norms_do_not_adapt(kind: str) -> None:
    check_rules(model_on_meta(kind))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_model_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """553 of the 804 kinds of transformers 5.23 build from their default configuration; the others are listed."""
    kinds, wrong, unbuilt = sorted(CONFIG_MAPPING.keys()), [], []
    for kind in kinds:
        try:
            model = model_on_meta(kind)
        except Exception as error:
            unbuilt.append(f"{kind}: {type(error).__name__}: {str(error).strip().splitlines()[0][:90]}")
            continue
        try:
            check_rules(model)
        except AssertionError as error:
            wrong.append(f"{kind}: {str(error).splitlines()[0]}")
    with capsys.disabled():
        built = f"\n{len(kinds) - len(unbuilt)} of {len(kinds)} built, without:"
        print(built, *unbuilt, sep="\n  ")  # noqa: T201
    assert not wrong, "\n".join(wrong)
    assert len(unbuilt) <= 0.35 * len(kinds)


# ---- Options --------------------------------------------------------------------------------------------------------


def test_adapt_all_adapts_what_does_not_decay() -> None:
    """NVLAMB's and optax's way: the exclusion is from decay only."""
    groups = by_flags(lamb_param_groups(Odd(), adapt_all=True))
    assert set(groups) == {(True, True), (False, True)}
    assert "final.weight" in groups[True, True]
    assert "grid.weight" in groups[False, True]


def keeping_norms(groups: list[dict]) -> set[str]:
    return {name for group in groups if group["fixed_norm"] for name in group["param_names"]}


def test_fixed_norm_is_for_hidden_matrices(bert: BertForMaskedLM) -> None:
    """Not for embeddings, nor for what the model ends with: their norms decide how sure the model can be."""
    layer = "bert.encoder.layer.0"
    matrices = {f"{layer}.attention.self.{name}.weight" for name in ("query", "key", "value")}
    matrices |= {f"{layer}.{name}.dense.weight" for name in ("attention.output", "intermediate", "output")}
    head = "cls.predictions.transform.dense.weight"
    groups = lamb_param_groups(bert, fixed_norm=True)
    assert keeping_norms(groups) == {*matrices, head}
    assert [group["name"] for group in groups] == ["decay, adapt, fixed_norm", "decay, adapt", "no_decay, no_adapt"]
    assert keeping_norms(lamb_param_groups(bert, fixed_norm=True, exclude_from_fixed_norm=["^cls"])) == matrices
    assert not any("fixed_norm" in group for group in lamb_param_groups(bert))
    untied = BertForMaskedLM(BertConfig(**{**bert.config.to_dict(), "tie_word_embeddings": False}))
    assert keeping_norms(lamb_param_groups(untied, fixed_norm=True)) == {*matrices, head}  # without the decoder
    classifier = nn.Sequential()
    classifier.dense, classifier.classifier = nn.Linear(2, 2), nn.Linear(2, 2)
    classifier.scale = nn.Parameter(torch.ones(1, 2))
    assert keeping_norms(lamb_param_groups(classifier, fixed_norm=True)) == {"dense.weight"}


def test_a_model_without_hidden_matrices_keeps_no_norm() -> None:
    """`Lamb`'s own option would otherwise hold for the groups, which do not name it."""
    groups = lamb_param_groups(nn.Embedding(3, 2), fixed_norm=True)
    assert [group["fixed_norm"] for group in Lamb(groups, fixed_norm=True).param_groups] == [False]


def test_patterns_exclude_more() -> None:
    """Decay and adaptation are separate switches; what is excluded by rule stays excluded."""
    groups = by_flags(
        lamb_param_groups(
            Odd(), exclude_from_weight_decay=["^scale$"], exclude_from_layer_adaptation=["in_proj_weight"]
        )
    )
    assert groups[False, True] == {"scale", "bias_conv.weight"}
    assert groups[True, False] == {"attention.in_proj_weight", "final.weight", "batch.weight"}
    assert "grid.weight" in groups[False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude_from_weight_decay": ["embeddings?"]}, r"exclude_from_weight_decay: 'embeddings\?' matches no"),
        ({"exclude_from_layer_adaptation": ["sclae"]}, "exclude_from_layer_adaptation: 'sclae' matches no"),
        ({"exclude_from_fixed_norm": ["atention"]}, "exclude_from_fixed_norm: 'atention' matches no"),
        ({"exclude_from_weight_decay": ["("]}, r"'\(' is no regular expression"),
    ],
)
def test_a_pattern_that_does_nothing_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lamb_param_groups(Odd(), **options)


def test_a_model_without_trainable_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="unfreeze some parameters: Linear has no trainable one"):
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
