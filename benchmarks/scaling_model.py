"""What LAMB's norms cost on 8, 64 and 1024 GPUs: a model, not a measurement; prints the table of docs/scaling.md.

python -m benchmarks.scaling_model
"""

import math

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from recipes.lib.report import no_options

GPUS_PER_NODE = 8
# Microseconds: NCCL's own model of its tree all-reduce with the low-latency protocol,
# https://github.com/NVIDIA/nccl/blob/01afd20a77b5804e0ecf1042509dd9d20ebf9e93/src/graph/tuning.cc
BASE, NVLINK_HOP, NETWORK_HOP = 4.4, 0.52, 5.0
SEVERAL_NODES = 1.8  # factor on the NVLink hop when there are several nodes
BYTES_PER_MICROSECOND = 80e3 / 3.8 / 2 * 0.4  # 80 GB/s, a quarter of it useful, both ways; worst size correction
# Bytes a second: HBM3 of an H100 SXM, https://www.nvidia.com/en-us/data-center/h100/
MEMORY = 3.35e12
BYTES_PER_UNIT, BYTES_PER_PARAMETER = 16, 40  # four fp32 sums; w, m and v visited twice, g once


def all_reduce_microseconds(gpus: int, size: int) -> float:
    """The latency of the tree, and the time on the wire for `size` bytes."""
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    inside = (gpus // nodes - 1) * NVLINK_HOP * (SEVERAL_NODES if nodes > 1 else 1)
    return BASE + 2 * (inside + math.log2(nodes) * NETWORK_HOP) + size / BYTES_PER_MICROSECOND


def models() -> dict[str, nn.Module]:
    """BERT-large and Llama-2-7B, without their weights."""
    bert = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    llama = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)
    with torch.device("meta"):
        return {"BERT-large": BertForMaskedLM(bert), "7B (Llama 2)": LlamaForCausalLM(llama)}


def table() -> str:
    """Markdown; times in microseconds a step."""
    rows = [
        "| model | GPUs | units | bytes | ours | one a tensor | four a tensor | the update itself |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in models().items():
        units = len(list(model.parameters()))
        parameters = sum(param.numel() for param in model.parameters())
        for gpus in (8, 64, 1024):
            size = BYTES_PER_UNIT * units
            ours = all_reduce_microseconds(gpus, 4) + all_reduce_microseconds(gpus, size)
            single = units * all_reduce_microseconds(gpus, 8)
            update = BYTES_PER_PARAMETER * parameters / gpus / MEMORY * 1e6
            rows.append(
                f"| {name} | {gpus:,} | {units} | {size:,} | {ours:.0f} | {single:,.0f} | {4 * single:,.0f} "
                f"| {update:,.0f} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    no_options(__doc__)
    print(table())
