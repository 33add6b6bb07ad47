"""Measures sharded against unsharded training, of this LAMB and of others, and writes docs/sharding.md's table.

`make sharding-report`: recipes/results/sharding.jsonl gets a line for each run, docs/sharding.md the table of them.
Each optimizer is compared with itself. `pip install timm pytorch_optimizer` for the columns of the others, `pip
install deepspeed` for the rows of ZeRO.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from recipes.lib.report import atomic_write, no_options, provenance
from recipes.study.tables import ROOT, write_tables
from tests import helpers

RESULTS = ROOT / "recipes/results/sharding.jsonl"
MARKERS = "sharding-report"

MODES = {
    "ddp": "DDP",
    "zero_redundancy": "ZeroRedundancyOptimizer",
    "fsdp2": "FSDP2",
    "fsdp2_columns": "FSDP2, `Shard(1)`",
    "fsdp2_bf16": "FSDP2, bf16 mixed precision",
    "hsdp": "HSDP",
    "fsdp1": "FSDP1",
    "fsdp1_flat": "FSDP1, flat parameters",
    "fsdp1_hybrid": "FSDP1, HYBRID_SHARD",
    "tp": "TP",
    "tp_sp": "TP + SP",
    "fsdp2_tp": "FSDP2 x TP",
    "ddp_fused": "DDP, fused layers",
    "fsdp2_fused": "FSDP2, fused layers",
    "fsdp2_columns_fused": "FSDP2, `Shard(1)`, fused layers",
    "hsdp_fused": "HSDP, fused layers",
    "fsdp1_fused": "FSDP1, fused layers",
    "fsdp1_flat_fused": "FSDP1, flat parameters, fused layers",
    "fsdp1_hybrid_fused": "FSDP1, HYBRID_SHARD, fused layers",
}
ZERO = {
    "zero0": "DeepSpeed, ZeRO-0",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_subgroups": "ZeRO-3, several sub-groups",
    "zero1_bf16_fp32_gradients": "ZeRO-1, bf16, fp32 gradients",
    "zero2_bf16": "ZeRO-2, bf16",
    "zero1_fused": "ZeRO-1, fused layers",
    "zero2_fused": "ZeRO-2, fused layers",
    "zero3_fused": "ZeRO-3, fused layers",
    "zero3_subgroups_fused": "ZeRO-3, several sub-groups, fused layers",
}
FOUR_ONLY = ("hsdp", "fsdp2_tp", "hsdp_fused")
TOLERANCE = {"float64": 1e-10, "float32": 1e-6}

CLIP = {"max_grad_norm": 0.1, "eps": 1e-2}  # a large eps, or Adam undoes any factor of the gradients
Column = tuple[str, str, str, dict[str, Any]]  # heading, module, dtype, options
OWN: list[Column] = [
    ("float64", "hf_lamb", "float64", {}),
    ("float64, clipping", "hf_lamb", "float64", CLIP),
    ("float32", "hf_lamb", "float32", {"eps": 1e-3}),
]
PEERS: list[Column] = [
    ("timm", "timm.optim", "float64", {"max_grad_norm": None}),
    ("timm, clipping", "timm.optim", "float64", CLIP),
    ("timm, `foreach=True`", "timm.optim", "float64", {"max_grad_norm": None, "foreach": True}),
    ("pytorch_optimizer", "pytorch_optimizer", "float64", {}),
]


def measure(processes: int, columns: list[Column]) -> list[dict[str, Any]]:
    """A record for each mode and column; those of one call share a launch.

    Fused layers are those of hf_lamb only: others take a parameter for a layer.
    """
    own = all(module == "hf_lamb" for _, module, _, _ in columns)
    modes = [mode for mode in MODES if processes == 4 or mode not in FOUR_ONLY]
    modes = [mode for mode in modes if own or not mode.endswith("_fused")]
    records = _measure(processes, columns, modes, "sharded_lamb")
    if find_spec("deepspeed"):
        # It knows no float64; at an eps of 1e-6 rounding noise of small gradients becomes a difference.
        columns = [(h, module, "float32", {"eps": 1e-3, **options}) for h, module, _, options in columns]
        columns = [column for column in columns if not column[0].startswith("float64")]
        records += _measure(
            processes, columns, [mode for mode in ZERO if own or not mode.endswith("_fused")], "zero_lamb"
        )
    return records


def _measure(processes: int, columns: list[Column], modes: list[str], script: str) -> list[dict[str, Any]]:
    cases = [
        {"mode": mode, "dtype": "float32" if mode == "fsdp2_bf16" else dtype, "optimizer": module, "options": options}
        for _, module, dtype, options in columns
        for mode in modes
    ]
    headings = [heading for heading, *_ in columns for _ in modes]
    with TemporaryDirectory() as folder:
        try:
            results = helpers.measure(processes, script, cases, Path(folder))
        except (pytest.fail.Exception, AssertionError, subprocess.TimeoutExpired) as error:
            failed = {"error": f"{type(error).__name__}: all processes failed or hung"}
            results = {json.dumps(case): failed for case in cases}
    records = []
    for heading, case in zip(headings, cases, strict=True):
        result = results[json.dumps(case)]
        kept = {key: result[key] for key in ("weights", "ratios", "norms", "same_weights", "error") if key in result}
        if "collectives" in result:
            kept["all_reduces"] = json.dumps(result["collectives"][0]).count('"allreduce"')
        records.append({"column": heading, "processes": processes, **case, **kept})
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, with what crashes explained below."""
    found = {(record["column"], record["mode"], record["processes"]): record for record in records}
    peers = [heading for heading, *_ in PEERS if any(record["column"] == heading for record in records)]
    crashes: dict[str, str] = {}

    def weights(heading: str, mode: str, processes: int) -> str:
        record = found.get((heading, mode, processes))
        if record is None:
            return "–"
        if "error" in record:
            error = re.sub(r"0x[0-9a-f]+", "0x...", record["error"])
            return f"crash ({crashes.setdefault(error, chr(ord('a') + len(crashes)))})"
        return _cell(record["weights"], record["dtype"])

    def ratios(heading: str, mode: str, processes: int) -> str:
        return _cell(found[heading, mode, processes]["ratios"], found[heading, mode, processes]["dtype"])

    def sent(heading: str, mode: str, processes: int) -> str:
        count = found.get((heading, mode, processes), {}).get("all_reduces")
        return f" ({count})" if count else ""

    own = [heading for heading, *_ in OWN]
    lines = [
        "| sharded by | processes | all-reduces a step | "
        + " | ".join([f"{heading}: w, r" for heading in own] + [f"{heading}: w (all-reduces)" for heading in peers])
        + " |",
        "| --- " * (3 + len(own) + len(peers)) + "|",
    ]
    for processes in (2, 4):
        for mode, title in {**MODES, **ZERO}.items():
            if (own[-1], mode, processes) not in found:
                continue
            cells = [
                f"{weights(h, mode, processes)}, {ratios(h, mode, processes)}"
                if (h, mode, processes) in found
                else "–"
                for h in own
            ]
            cells += [weights(heading, mode, processes) + sent(heading, mode, processes) for heading in peers]
            count = found[own[-1], mode, processes]["all_reduces"]
            lines.append(f"| {title} | {processes} | {count} | " + " | ".join(cells) + " |")
    lines += [f"\n({letter}) `{error}`" for error, letter in crashes.items()]
    return "\n".join(lines) + "\n"


def _cell(difference: float, dtype: str) -> str:
    text = "0" if difference == 0 else f"{difference:.0e}".replace("e-0", "e-")
    return text if difference <= TOLERANCE[dtype] else f"**wrong: {text}**"


def main() -> None:
    records = []
    installed = [column for column in PEERS if find_spec(column[1].split(".")[0])]
    packages = sorted({module.split(".")[0] for _, module, _, _ in installed})
    facts = provenance()
    facts["versions"] |= {package: version(package) for package in packages}
    for processes in (2, 4):
        for columns in [OWN, *([column] for column in installed)]:
            print(f"{processes} processes: {', '.join(heading for heading, *_ in columns)}", file=sys.stderr)
            records += measure(processes, columns)
    with atomic_write(RESULTS) as unfinished:
        unfinished.write_text("".join(json.dumps({**facts, **record}) + "\n" for record in records))
    write_tables("docs/sharding.md", {MARKERS: table(records)})
    print(table(records))


if __name__ == "__main__":
    no_options(__doc__ or "")
    main()
