"""A small ModernBERT, whose `Wqkv` and `Wi` hold three and two layers, and its twin in which each is a parameter."""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ModernBertConfig, ModernBertForMaskedLM

from hf_lamb import Lamb

VOCAB, WIDTH, INTERMEDIATE, LENGTH = 101, 36, 53, 12
FUSED = {"Wqkv": 3, "Wi": 2}


class Unfused(nn.ModuleList):
    """Linear layers side by side, in place of one with the rows of all.

    The products are those of the fused layer, bit for bit: ModernBERT rounds some to float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (torch.cat([getattr(layer, kind) for layer in self]) for kind in ("weight", "bias"))
        return functional.linear(x, weight, bias)


def fused_model(dtype: torch.dtype, layers: int = 2) -> ModernBertForMaskedLM:
    """Of ragged sizes: on two and four processes the borders of shards cut layers, and rows are not even.

    The layers of one parameter are of very different size, and so are their rows and columns: whatever norm is of the
    wrong elements is wrong by far.
    """
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=6,
        max_position_embeddings=LENGTH,
        attention_bias=True,
        mlp_bias=True,
        attn_implementation="eager",
        **{f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "cls", "sep")},
    )
    model = ModernBertForMaskedLM(config).to(dtype)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.add_(torch.randn_like(param) * 0.02)  # biases start at zero
            for dim, size in enumerate(param.shape):
                factors = torch.empty(size, dtype=dtype).uniform_(-1, 1).exp_()
                param.mul_(factors.view([-1 if i == dim else 1 for i in range(param.ndim)]))
            blocks = param.chunk(FUSED.get(name.split(".")[-2], 1))
            for i, block in enumerate(blocks):
                block.mul_(4.0 ** (i - 1))
    return model


def unfuse(model: ModernBertForMaskedLM) -> ModernBertForMaskedLM:
    """Put the layers of each fused parameter side by side, in place."""
    for module in [*model.modules()]:
        for own_name, layers in FUSED.items():
            linear = getattr(module, own_name, None)
            if isinstance(linear, nn.Linear):
                single = nn.Linear(linear.in_features, linear.out_features // layers, dtype=linear.weight.dtype)
                parts = Unfused([single if i == 0 else _like(single) for i in range(layers)])
                with torch.no_grad():
                    for i, part in enumerate(parts):
                        part.weight.copy_(linear.weight.chunk(layers)[i])
                        part.bias.copy_(linear.bias.chunk(layers)[i])
                setattr(module, own_name, parts)
    return model


def _like(linear: nn.Linear) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype)


def fused_name(name: str) -> str:
    """The name of a twin's layer in the fused model's `layer_stats`: `Wi.1.bias` there is `Wi.bias[1]` here."""
    return re.sub(rf"({'|'.join(FUSED)})\.(\d)\.(\w+)$", r"\1.\3[\2]", name)


def layers_of(optimizer: Lamb) -> dict[str, tuple[float, ...]]:
    """What `layer_stats` says, by the names of the fused model's layers."""
    return {fused_name(name): tuple(stats) for name, stats in optimizer.layer_stats().items()}


def in_layers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a fused model or its twin by the names of the fused model's layers."""
    found = {}
    for name, weight in weights.items():
        if fused_name(name) != name:
            found[fused_name(name)] = weight
            continue
        layers = FUSED.get(name.split(".")[-2], 1)
        for i, block in enumerate(weight.chunk(layers)):
            found[f"{name}[{i}]" if layers > 1 else name] = block
    return found


def batch(step: int, rows: int = 4) -> dict[str, Tensor]:
    """The batch of a step. Where there are several processes all take the whole, so that their gradients are equal.

    ModernBERT rounds to float32, and how depends on the number of rows.
    """
    generator = torch.Generator().manual_seed(step)
    ids = torch.rand(rows, LENGTH, generator=generator).pow(3).mul(VOCAB - 1).long() + 1
    masked = torch.rand(rows, LENGTH, generator=generator).argsort(dim=1) < 3
    return {"input_ids": ids.masked_fill(masked, 1), "labels": ids.masked_fill(~masked, -100)}
