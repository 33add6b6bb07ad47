"""Protects parameters that hold several layers: each layer is one, as if it were a parameter of its own.

Sharded: `tests/test_sharding.py` and `tests/test_deepspeed.py`.
"""

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from hf_lamb import Lamb, LambTrainer, LambTrainingArguments, ShardingError, lamb_param_groups, options_in_force
from hf_lamb.fused_layers import layers_of_groups
from hf_lamb.trainer.phases import PreviousPhase
from tests.helpers import BACKENDS, one_line
from tests.reference import ReferenceLamb
from tests.twins import batch, fused_model, in_layers, layers_of, unfuse

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
OPTIONS = [
    {},
    {"fixed_norm": True},
    {"max_grad_norm": 0.1, "max_trust_ratio": 2.0},
    {"skip_nonfinite": False, "bias_correction": False, "min_trust_ratio": 0.1},
]


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_fused_model_takes_the_steps_of_the_unfused_one(
    options: dict[str, object], dtype: torch.dtype, backend: dict[str, bool]
) -> None:
    """Ten steps: the weights, and each layer's norms and ratio. Biases adapt too, so that theirs count."""
    fused, unfused = fused_model(dtype), unfuse(fused_model(dtype))
    # Rounding noise of the smallest gradients would become part of a direction at an eps of 1e-6.
    shared = {"lr": 1e-2, "eps": 1e-3 if dtype == torch.float32 else 1e-6, **backend, **options}
    keeps = bool(options.get("fixed_norm"))
    ours, theirs = (Lamb(lamb_param_groups(m, adapt_all=True, fixed_norm=keeps), **shared) for m in (fused, unfused))
    for step in range(10):
        for model, optimizer in ((fused, ours), (unfused, theirs)):
            optimizer.zero_grad()
            model(**batch(step)).loss.backward()
            optimizer.step()
        expected, found = layers_of(theirs), layers_of(ours)
        assert found.keys() == expected.keys()
        for name, stats in found.items():
            assert stats == pytest.approx(expected[name], rel=10 * TOLERANCE[dtype]), name
    got, wanted = (in_layers({name: w.detach() for name, w in m.named_parameters()}) for m in (fused, unfused))
    assert got.keys() == wanted.keys()
    for name, w in wanted.items():
        assert float((got[name] - w).norm() / w.norm()) <= TOLERANCE[dtype], name


# -- the update ------------------------------------------------------------------------------------------------------

# Rows of equal and of other layers, of one row, of vectors and of stacked matrices; the others are whole.
SHAPES = {"a": (9, 5), "b": (7, 4), "c": (6,), "d": (2, 4, 3), "whole": (5, 3)}
ROWS = {"a": [3, 3, 3], "b": [4, 1, 2], "c": [2, 2, 2], "d": [1, 1]}
SPLIT = tuple((name, tuple(n * (np.prod(SHAPES[name][1:], dtype=int).item()) for n in ROWS[name])) for name in ROWS)


class Case:
    """An optimizer over `SHAPES`, whose gradients lie elsewhere in each step."""

    def __init__(self, dtype: torch.dtype = torch.float64, split: Any = SPLIT, **options: Any) -> None:
        self.params = {n: nn.Parameter(draw(i, *s).to(dtype)) for i, (n, s) in enumerate(SHAPES.items())}
        self.optimizer = Lamb([{"params": [*self.params.items()], "split": split}], **{"lr": 0.1, **options})

    def step(self, number: int) -> dict[str, Tensor]:
        for i, param in enumerate(self.params.values()):
            param.grad = draw(100 * number + i, *param.shape).to(param.dtype)
        grads = {name: param.grad for name, param in self.params.items()}
        self.optimizer.step()
        return grads


def draw(seed: int, *shape: int) -> Tensor:
    """Entries of very different size."""
    generator = torch.Generator().manual_seed(seed)
    size = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).exp()
    return torch.randn(shape, generator=generator, dtype=torch.float64) * size


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"fixed_norm": True}, {"max_grad_norm": 1.0, "maximize": True}], ids=str)
def test_equals_the_float64_reference(options: dict[str, Any], dtype: torch.dtype, backend: dict[str, bool]) -> None:
    check_the_reference(options, dtype, backend)


def check_the_reference(options: dict[str, Any], dtype: torch.dtype, backend: dict[str, bool]) -> None:
    case = Case(dtype, **backend, **options)
    rows = {i: ROWS[name] for i, name in enumerate(SHAPES) if name in ROWS}
    reference = ReferenceLamb([p.detach().double().numpy() for p in case.params.values()], 0.1, rows=rows, **options)
    for number in range(10):
        reference.step([grad.double().numpy() for grad in case.step(number).values()])
    for param, w in zip(case.params.values(), reference.w, strict=True):
        assert np.abs(param.detach().double().numpy() - w).max() <= 5 * TOLERANCE[dtype] * np.abs(w).max()


@BACKENDS
def test_a_parameter_has_one_state_and_counts_its_steps_once(backend: dict[str, bool]) -> None:
    """So that checkpoints have one form, whatever is split."""
    split, whole = Case(**backend), Case(split=(), **backend)
    for number in range(3):
        split.step(number)
        whole.step(number)
    for a, b in zip(split.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert float(a["step"]) == float(b["step"]) == 3
        for moment in ("exp_avg", "exp_avg_sq"):
            assert a[moment].shape == b[moment].shape


def step_is_written(case: Case) -> None:
    """In place, as `carry_over="moments"` does."""
    for state in case.optimizer.state.values():
        state["step"].zero_()


def layers_are_changed(case: Case) -> None:
    case.optimizer.param_groups[0]["split"] = SPLIT[1:]


def a_gradient_is_missing(case: Case) -> None:
    param = case.params.pop("a")
    param.grad = None


def data_is_transposed(case: Case) -> None:
    param = case.params["a"]
    param.data = param.data.t().contiguous().t()


def groups_are_moved(case: Case) -> None:
    group = case.optimizer.param_groups[0]
    names, params = group["param_names"], group["params"]
    group["param_names"], group["params"], group["split"] = names[1:], params[1:], SPLIT[1:]
    case.optimizer.add_param_group({"params": [(names[0], params[0])], "split": SPLIT[:1], "weight_decay": 0.3})


def gradients_are_looked_at(case: Case) -> None:
    """Twice, as `clip_grad_norm` does; the step counts grow by one."""
    case.optimizer.clip_grad_norm(torch.inf)


CHANGES: list[Callable[[Case], None]] = [
    step_is_written,
    layers_are_changed,
    a_gradient_is_missing,
    data_is_transposed,
    groups_are_moved,
    gradients_are_looked_at,
]


@BACKENDS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_buckets_that_are_kept_are_those_made_anew(change: Callable[[Case], None], backend: dict[str, bool]) -> None:
    """Whatever changes between two steps."""
    kept, fresh = Case(torch.float32, **backend), Case(torch.float32, **backend)
    for number in range(6):
        if number == 3:
            change(kept)
            change(fresh)
        fresh.optimizer._packing.__init__()  # forgets the buckets; only a private name can
        kept.step(number)
        fresh.step(number)
        assert kept.optimizer.layer_stats() == fresh.optimizer.layer_stats()
        for name, param in kept.params.items():
            assert torch.equal(param, fresh.params[name]), name


@BACKENDS
def test_gradients_in_any_memory_order(backend: dict[str, bool]) -> None:
    """A gradient whose rows do not follow each other in memory, as of an expanded sum."""
    plain, other = Case(**backend), Case(**backend)
    for number in range(3):
        for i, (a, b) in enumerate(zip(plain.params.values(), other.params.values(), strict=True)):
            a.grad = draw(i + number, *a.shape)
            b.grad = a.grad.permute(*reversed(range(a.ndim))).contiguous().permute(*reversed(range(a.ndim)))
        plain.optimizer.step()
        other.optimizer.step()
    for a, b in zip(plain.params.values(), other.params.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("what", ["d", "exp_avg of d", "exp_avg_sq of d"])
def test_refuses_to_update_copies(what: str) -> None:
    """Blocks of rows of stacked matrices that lie in another order in memory: their update would be lost."""
    case = Case(split=(*SPLIT[:3], ("d", (6, 6, 6, 6))))
    case.step(0)
    param = case.params["d"]
    tensor = param if what == "d" else case.optimizer.state[param][what.removesuffix(" of d")]
    tensor.data = tensor.data.mT.contiguous().mT
    before = param.detach().clone()
    with one_line(ShardingError, rf"call \.contiguous\(\) on {what}, or use .*split=False.*not whole rows"):
        case.step(1)
    assert torch.equal(param, before)
    tensor.data = tensor.data.contiguous()
    case.step(1)
    assert not torch.equal(param, before)


def test_a_layer_without_gradient_keeps_its_weights() -> None:
    """An expert that no token went to; the others move."""
    case = Case()
    before = case.params["a"].detach().clone()
    for param in case.params.values():
        param.grad = torch.ones_like(param)
    case.params["a"].grad[3:6] = 0
    case.optimizer.step()
    moved = (case.params["a"] != before).all(dim=1)
    assert moved.tolist() == [True] * 3 + [False] * 3 + [True] * 3
    assert "a[1]" not in case.optimizer.layer_stats()


# -- which parameters are known --------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **{f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "cls", "sep")},
}
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
# By model: what is fused in it, by the name of the module or parameter.
KNOWN: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "modernbert": ("ModernBertForMaskedLM", {"attention_bias": True, "mlp_bias": True}, {"Wqkv", "Wi"}),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", {"mlp_bias": True}, {"Wi"}),
    "mpt": ("MptForCausalLM", {"d_model": 16, "n_heads": 4, "n_layers": 1}, {"Wqkv"}),
    "phi3": ("Phi3ForCausalLM", {}, {"qkv_proj", "gate_up_proj"}),
    "glm": ("GlmForCausalLM", {"head_dim": 4}, {"gate_up_proj"}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 4}, {"gate_up_proj"}),
    "mixtral": ("MixtralForCausalLM", EXPERTS, {"gate_up_proj", "down_proj"}),
    "olmoe": ("OlmoeForCausalLM", EXPERTS, {"gate_up_proj", "down_proj"}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", EXPERTS, {"gate_up_proj", "down_proj"}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS, {"gate_up_proj", "down_proj"}),
}


def build(model_type: str, class_name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **options})
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.3)  # so that every weight has its share of the result
    return model


def fusions(model: nn.Module, **options: Any) -> dict[str, tuple[int, ...]]:
    return {name: sizes for group in lamb_param_groups(model, **options) for name, sizes in group.get("split", ())}


def rescale(model: nn.Module, layers: dict[str, tuple[int, ...]]) -> None:
    """Multiply layers by powers of two that cancel: q and k; v and the output; a gate's linear half and the output."""
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, sizes in layers.items():
            blocks = params[name].view(-1).split(sizes)
            path = name.replace(".weight", "").replace(".bias", "").split(".")[:-1]
            outputs = [n for n in params if n.split(".")[: len(path)] == path and n != name and "bias" not in n]
            output = [n for n in outputs if any(part in n for part in ("Wo", "out_proj", "o_proj", "down_proj"))]
            if "qkv" in name or "in_proj" in name:
                blocks[0].mul_(2)
                blocks[1].mul_(0.5)
                blocks[2].mul_(2)
                if "bias" not in name:
                    params[output[0]].mul_(0.5)
            elif "down_proj" not in name:
                for i, block in enumerate(blocks[1::2]):
                    block.mul_(2.0 ** (i + 1))
                if "bias" not in name:
                    down = params[output[0]].view(-1).split(layers.get(output[0], (params[output[0]].numel(),)))
                    for i, block in enumerate(down):
                        block.mul_(0.5 ** (i + 1))


@pytest.mark.parametrize("model_type", KNOWN)
def test_what_is_known_are_really_the_layers(model_type: str) -> None:
    """By a symmetry of the model: a border that is off by one row, or rows in another order, change its result."""
    class_name, options, fused = KNOWN[model_type]
    model = build(model_type, class_name, options)
    ids = torch.arange(1, 9).view(2, 4)
    before = model(input_ids=ids).logits
    layers = fusions(model)
    names = {name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for name in layers}
    assert names == fused
    rescale(model, layers)
    after = model(input_ids=ids).logits
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-5)
    assert before.std() > 0.1


def test_multihead_attention_is_known() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0).eval()
    nn.init.normal_(model.self_attn.in_proj_bias)
    layers = fusions(model)
    assert layers == {"self_attn.in_proj_weight": (64, 64, 64), "self_attn.in_proj_bias": (8, 8, 8)}
    x = torch.randn(5, 3, 8)
    before = model(x)
    rescale(model, layers)
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-5)
    assert fusions(nn.MultiheadAttention(8, 2, kdim=4)) == {"in_proj_bias": (8, 8, 8)}  # its matrices are separate


def test_thirds_of_interleaved_heads_are_not_the_layers() -> None:
    """What a rule by name would take for query, key and value."""
    model = build("gpt_neox", "GPTNeoXForCausalLM", {})
    ids = torch.arange(1, 9).view(2, 4)
    before = model(input_ids=ids).logits
    assert fusions(model) == {}
    weight = model.gpt_neox.layers[0].attention.query_key_value.weight
    with torch.no_grad():
        for third, factor in zip(weight.chunk(3), (2, 0.5, 1), strict=True):
            third.mul_(factor)
    assert not torch.allclose(model(input_ids=ids).logits, before, rtol=1e-2, atol=1e-2)


def test_a_class_of_ones_own_is_not_known() -> None:
    """Its `forward` may cut the rows elsewhere."""
    model = build("modernbert", "ModernBertForMaskedLM", {})
    attention = model.model.layers[0].attn
    attention.__class__ = type("Own", (type(attention),), {})
    assert [name for name in fusions(model) if "Wqkv" in name] == []
    assert [name for name in fusions(model) if "Wi" in name] == ["model.layers.0.mlp.Wi.weight"]


def test_what_holds_no_layers_has_no_entry() -> None:
    """A checkpoint of such a model is that of an older version."""
    assert all("split" not in group for group in lamb_param_groups(nn.LSTM(3, 4)))  # gates are one layer in the paper
    assert all("split" not in group for group in lamb_param_groups(nn.Linear(3, 6), split=False))


# -- own models ------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.kv = nn.Linear(4, 10, bias=False)
        self.experts = nn.Parameter(torch.randn(2, 6, 3))


def test_own_layers() -> None:
    split = {r"^qkv\.": 3, "^kv.weight$": 1, "^kv": [4, 6], "experts": 4}
    assert fusions(Own(), split=split) == {
        "qkv.weight": (16, 16, 16),
        "qkv.bias": (4, 4, 4),
        "kv.weight": (16, 24),
        "experts": (9, 9, 9, 9),
    }


def test_own_layers_add_to_the_known_ones() -> None:
    model = build("modernbert", "ModernBertForMaskedLM", {})
    name = "model.layers.0.attn.Wqkv.weight"
    known = fusions(model)
    assert fusions(model, split={"head.dense": 2}) == {**known, "head.dense.weight": (128, 128)}
    assert fusions(model, split={"Wqkv": 1}) == {n: sizes for n, sizes in known.items() if n != name}
    assert fusions(model, split=False) == {}


BAD: dict[str, tuple[Any, str]] = {
    "text": ("Wqkv", "expected True, False, or a dict .*'attn.Wqkv': 3.*got 'Wqkv'"),
    "a number": (3, "expected True, False.*got 3"),
    "no number of layers": ({"qkv": "3"}, "'qkv': expected a number of layers.*the rows of each.*got '3'"),
    "zero layers": ({"qkv": 0}, "'qkv': expected a number of layers.*got 0"),
    "half a row": ({"qkv": [2.5, 9.5]}, "'qkv': expected a number of layers.*got .2.5, 9.5."),
    "no pattern": ({"(": 3}, "'[(]' is no regular expression"),
    "no such parameter": ({"Wqkv": 3}, "'Wqkv' matches no trainable parameter, such as"),
    "no divisor": (
        {"^kv": 3},
        r"'\^kv': 3 does not fit kv.weight of shape [(]10, 4[)]: the layers must be whole rows",
    ),
    "rows that do not add up": ({"^kv": [4, 4]}, r".4, 4. does not fit kv.weight of shape [(]10, 4[)]"),
    "half a matrix": ({"experts": 8}, "8 does not fit experts of shape"),
}


@pytest.mark.parametrize(("split", "message"), BAD.values(), ids=BAD)
def test_refuses_layers_that_cannot_be(split: Any, message: str) -> None:
    with one_line(ValueError, "lamb_param_groups: split: .*" + message):
        lamb_param_groups(Own(), split=split)


REFUSED = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 8, "n_head": 2, "n_layer": 1},
        "c_attn",
        "Conv1D stores its layers as columns",
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {},
        "query_key_value",
        "GPTNeoXAttention stores the rows of one attention head",
    ),
    "bloom": ("BloomForCausalLM", {"n_head": 4, "n_layer": 1}, "query_key_value", "BloomAttention stores"),
    "persimmon": ("PersimmonForCausalLM", {}, "query_key_value", "PersimmonAttention stores"),
    "deberta": ("DebertaForMaskedLM", {}, "in_proj", "DisentangledSelfAttention stores"),
    "falcon": ("FalconForCausalLM", {"multi_query": False}, "query_key_value", "FalconAttention stores"),
    "gpt_bigcode": (
        "GPTBigCodeForCausalLM",
        {"multi_query": False, "n_embd": 48, "n_head": 4, "n_layer": 1},
        "c_attn",
        "GPTBigCodeAttention stores",
    ),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refuses_what_is_not_blocks_of_rows(model_type: str) -> None:
    class_name, options, pattern, message = REFUSED[model_type]
    model = build(model_type, class_name, options)
    with one_line(ValueError, f"split: remove '{pattern}', which matches .*{message}"):
        lamb_param_groups(model, split={pattern: 3})


@pytest.mark.parametrize(
    ("model_type", "class_name", "pattern"),
    [("falcon", "FalconForCausalLM", "query_key_value"), ("gpt_bigcode", "GPTBigCodeForCausalLM", "c_attn")],
)
def test_takes_the_blocks_of_heads_that_share_key_and_value(model_type: str, class_name: str, pattern: str) -> None:
    """Their rows are all queries, one key, one value."""
    model = build(model_type, class_name, {"multi_query": True, "n_embd": 48, "n_head": 4, "n_layer": 1})
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith(f"{pattern}.weight"))
    head = (len(weight) - weight.shape[1]) // 2
    rows = [weight.shape[1], head, head]
    groups = lamb_param_groups(model, split={rf"{pattern}\.weight": rows})
    sizes = tuple(count * weight.shape[1] for count in rows)
    assert (name, sizes) in [entry for group in groups for entry in group.get("split", ())]


GROUPS: dict[str, tuple[Any, str]] = {
    "no pairs": ({"a": 3}, "Invalid \"split\" of a group: {'a': 3}: expected pairs.*lamb_param_groups"),
    "an empty layer": ((("a", (45, 0)),), 'Invalid "split" of a group'),
}


@pytest.mark.parametrize(("split", "message"), GROUPS.values(), ids=GROUPS)
def test_refuses_groups_that_nobody_made(split: Any, message: str) -> None:
    with one_line(ValueError, message):
        Case(split=split)


def test_refuses_sizes_of_another_model() -> None:
    with one_line(ShardingError, "a, which has 45 elements.*layers of 20, 20.*lamb_param_groups of this model"):
        Case(split=(("a", (20, 20)),)).step(0)


def test_refuses_names_that_are_not_there() -> None:
    """Without names, or with others, the parameter would silently be one layer."""
    case = Case()
    del case.optimizer.param_groups[0]["param_names"]
    with one_line(ShardingError, 'keep "param_names" and "split" together.*no parameter is named a, which "split"'):
        case.step(0)


# -- Trainer ---------------------------------------------------------------------------------------------------------


def fused_trainer(tmp_path: Path, optim_args: str | None = None) -> LambTrainer:
    args = LambTrainingArguments(
        output_dir=str(tmp_path),
        optim="lamb",
        optim_args=optim_args,
        max_steps=1,
        logging_steps=1,
        log_trust_ratio_per_layer=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = [{name: value[0].tolist() for name, value in batch(i).items()} for i in range(8)]
    return LambTrainer(fused_model(torch.float32, layers=1), args, train_dataset=rows)


@pytest.mark.parametrize(("optim_args", "of_wqkv"), [(None, 3), ("split=false", 1)])
def test_logs_and_the_model_card_say_what_is_split(optim_args: str | None, of_wqkv: int, tmp_path: Path) -> None:
    trainer = fused_trainer(tmp_path, optim_args)
    trainer.train()
    logged = {name for line in trainer.state.log_history for name in line if "Wqkv.weight" in name}
    name = "lamb/trust_ratio/model.layers.0.attn.Wqkv.weight"
    assert logged == ({f"{name}[{i}]" for i in range(3)} if of_wqkv == 3 else {name})
    assert options_in_force(trainer.optimizer)["split"] is (of_wqkv == 3)
    trainer.create_model_card()
    said = (
        "4 hold 10 layers, each with a trust ratio of its own" if of_wqkv == 3 else "each is one layer (split=False)"
    )
    assert f"- fused parameters: {said}\n" in (tmp_path / "README.md").read_text()


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_layers() -> None:
    whole, first, second = Case(), Case(), Case()
    for number in range(4):
        whole.step(number)
        if number < 2:
            first.step(number)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    with torch.no_grad():
        for name, param in first.params.items():
            second.params[name].copy_(param)
    for number in range(2, 4):
        second.step(number)
    assert second.optimizer.layer_stats() == whole.optimizer.layer_stats()
    for name, param in whole.params.items():
        assert torch.equal(param, second.params[name])


@pytest.mark.parametrize(("now", "then"), itertools.permutations([SPLIT, (), None], 2), ids=str)
def test_a_checkpoint_with_other_layers_says_so(now: Any, then: Any) -> None:
    """And holds, also one of an older version, which has no word of layers."""
    case, other = Case(split=now or ()), Case(split=then or ())
    if then is None:
        del other.optimizer.param_groups[0]["split"]
    other.step(0)
    if (now or ()) == (then or ()):
        case.optimizer.load_state_dict(other.optimizer.state_dict())
        return
    here, there = (3, 1) if now else (1, 3)
    message = rf"keeps its checkpoint's layers: a is {there} there, and {here} in these groups\. Start a new run"
    with pytest.warns(UserWarning, match=message):
        case.optimizer.load_state_dict(other.optimizer.state_dict())
    case.step(1)
    assert ("a[0]" in case.optimizer.layer_stats()) == bool(then)


def with_layers_of(optimizer: torch.optim.Optimizer, then: str) -> None:
    """What a checkpoint of then has in its groups."""
    for group in optimizer.param_groups:
        if then == "an older version's":
            group.pop("split", None)
        elif then == "whole":
            group["split"] = ()


@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("then", ["split", "whole", "an older version's"])
@pytest.mark.parametrize("now", ["split", "whole", "an older version's"])
def test_a_run_goes_on_with_the_layers_of_an_fsdp_checkpoint(now: str, then: str, kind: str, tmp_path: Path) -> None:
    """Whose loading takes the keys of groups from the optimizer; and says so."""
    first, second = (fused_trainer(tmp_path) for _ in range(2))
    for trainer in (first, second):
        trainer.create_optimizer_and_scheduler(4)
    with_layers_of(first.optimizer, then)
    with_layers_of(second.optimizer, now)
    for number, param in enumerate(first.model.parameters()):
        param.grad = draw(number, *param.shape).float()
    first.optimizer.step()
    torch.save(first.lr_scheduler.state_dict(), tmp_path / "scheduler.pt")
    options = StateDictOptions(full_state_dict=kind == "full")
    saved = get_optimizer_state_dict(first.model, first.optimizer, options=options)
    if kind == "full":
        torch.save(saved, tmp_path / "optimizer.bin")
        (tmp_path / "pytorch_model_fsdp.bin").touch()
    else:
        dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "optimizer_0")
        (tmp_path / "pytorch_model_fsdp_0").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second._load_optimizer_and_scheduler(str(tmp_path))
    said = [text for text in (str(w.message) for w in caught) if "this run keeps its checkpoint's layers" in text]
    assert len(said) == ((now == "split") != (then == "split")), said
    for group, of_checkpoint in zip(second.optimizer.param_groups, first.optimizer.param_groups, strict=True):
        assert layers_of_groups([group]) == layers_of_groups([of_checkpoint])
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(first.optimizer.state[a]["exp_avg"], second.optimizer.state[b]["exp_avg"])


@pytest.mark.parametrize("then", ["split", "an older version's"])
def test_a_next_phase_has_layers_of_its_own(then: str, tmp_path: Path) -> None:
    """And does not say that it keeps its checkpoint's; a resumed one does."""
    first, second = (fused_trainer(tmp_path) for _ in range(2))
    for trainer in (first, second):
        trainer.create_optimizer_and_scheduler(4)
    with_layers_of(first.optimizer, then)
    with_layers_of(second.optimizer, "split" if then != "split" else "an older version's")
    for param in first.model.parameters():
        param.grad = torch.ones_like(param)
    first.optimizer.step()
    own = layers_of_groups(second.optimizer.param_groups)
    first.model.save_pretrained(tmp_path / "checkpoint-1")
    torch.save(first.optimizer.state_dict(), tmp_path / "checkpoint-1/optimizer.pt")
    torch.save(first.lr_scheduler.state_dict(), tmp_path / "checkpoint-1/scheduler.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PreviousPhase(str(tmp_path / "checkpoint-1"), "optimizer").take_over(second)
    assert not [w for w in caught if "checkpoint's layers" in str(w.message)]
    assert layers_of_groups(second.optimizer.param_groups) == own
    assert len(second.optimizer.state) == len(first.optimizer.state) > 0
    with pytest.warns(UserWarning, match="keeps its checkpoint's layers"):
        second._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-1"))


def test_refuses_a_damaged_checkpoint() -> None:
    case = Case()
    saved = case.optimizer.state_dict()
    saved["param_groups"][0]["split"] = "a"
    with one_line(ValueError, "Invalid \"split\" of a group: 'a'"):
        case.optimizer.load_state_dict(saved)
