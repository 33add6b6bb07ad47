"""Examines every LAMB that is installed with `hf_lamb.conformance`, and writes the table of docs/conformance.md.

python -m benchmarks.conformance

It needs no GPU. LAMBs that run on a GPU only are examined on a machine that has one: --device cuda.
"""

import argparse
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

from torch.optim import Optimizer

from benchmarks.peers import timm_lamb
from benchmarks.records import RESULTS, Record, recorded, stamp
from hf_lamb.conformance import examine
from recipes.lib.report import append_json_line
from recipes.study.tables import markdown_table, write_tables

FILE = RESULTS / "conformance.jsonl"
MARKERS, DOCUMENT = "results: conformance", "docs/conformance.md"


class Candidate(NamedTuple):
    """An optimizer that is called LAMB, with options that matter."""

    name: str  # MODULE:NAME
    options: dict[str, Any]
    distribution: str


CANDIDATES = (
    Candidate("hf_lamb:Lamb", {}, "hf_lamb"),
    Candidate("hf_lamb:Lamb", {"max_trust_ratio": 10.0}, "hf_lamb"),
    Candidate("hf_lamb:Lamb", {"bias_correction": False}, "hf_lamb"),
    Candidate("hf_lamb:Lamb", {"max_grad_norm": 1.0}, "hf_lamb"),
    Candidate("hf_lamb:Lamb", {"max_trust_ratio": 1.0}, "hf_lamb"),
    Candidate("hf_lamb:Lamb", {"fixed_norm": True}, "hf_lamb"),
    Candidate("hf_lamb:Lamb", {"layer_adaptation": False}, "hf_lamb"),
    Candidate("timm.optim:Lamb", {}, "timm"),
    Candidate("timm.optim:Lamb", {"weight_decay": 0.0}, "timm"),
    Candidate("timm.optim:Lamb", {"always_adapt": True}, "timm"),
    Candidate("timm.optim:Lamb", {"always_adapt": True, "max_grad_norm": None}, "timm"),
    Candidate("timm.optim:Lamb", {"trust_clip": True}, "timm"),
    Candidate("timm.optim:Lamb", {"decoupled_decay": True}, "timm"),
    Candidate("pytorch_optimizer:Lamb", {}, "pytorch_optimizer"),
    Candidate("pytorch_optimizer:Lamb", {"adam_debias": True, "weight_decouple": False}, "pytorch_optimizer"),
    Candidate("torch_optimizer:Lamb", {}, "torch_optimizer"),
    Candidate("torch_optimizer:Lamb", {"debias": True}, "torch_optimizer"),
    Candidate("bitsandbytes.optim:LAMB", {}, "bitsandbytes"),
    Candidate("bitsandbytes.optim:LAMB8bit", {"min_8bit_size": 1}, "bitsandbytes"),
    Candidate("apex.optimizers:FusedLAMB", {}, "apex"),
    Candidate("apex.optimizers:FusedLAMB", {"use_nvlamb": True}, "apex"),
    Candidate("deepspeed.ops.lamb:FusedLamb", {}, "deepspeed"),
    Candidate("torch.optim:AdamW", {}, "torch"),
)
COLUMNS = ("variant", "weights of zero", "gradients of zero", "bf16 weights", "a non-finite gradient")
COLUMNS += ("a save and a load",)


def load(candidate: Candidate) -> type[Optimizer]:
    """The class. Raises ImportError where it is not installed."""
    if candidate.name == "timm.optim:Lamb":
        return timm_lamb()
    module, _, name = candidate.name.partition(":")
    found: type[Optimizer] = getattr(import_module(module), name)
    return found


def examined(candidate: Candidate, device: str = "cpu") -> Record | None:
    """What `examine` says of it; None where it is not installed, or does not run on this device."""
    try:
        rows = examine(load(candidate), candidate.options, device).rows()
    except ImportError as error:
        print(f"{candidate.name} is left out: {error}")
        return None
    except ValueError as error:
        print(f"{candidate.name} cannot run here: {error}")
        return None
    options = ", ".join(f"{name}={value!r}" for name, value in candidate.options.items())
    return {"name": candidate.name, "options": options, "version": version(candidate.distribution), "rows": rows}


def table(records: list[Record]) -> str:
    """The newest examination of each LAMB, in Markdown, and where those depart that are no variant."""
    newest = {(row["name"], row["options"]): row for record in records for row in record["lambs"]}
    known = [(c.name, ", ".join(f"{n}={v!r}" for n, v in c.options.items())) for c in CANDIDATES]
    rows = []
    for key in known:
        if (row := newest.get(key)) is not None:
            first = row["rows"]["departs first"]
            where = "" if first == "nowhere" else f" ({first})"
            cells = [row["rows"][column] for column in COLUMNS]
            options = f" `{row['options']}`" if row["options"] else ""
            rows.append([f"`{row['name']}` {row['version']}{options}", cells[0] + where, *cells[1:]])
    return markdown_table(["LAMB", *COLUMNS], rows)


def main() -> None:
    """Examine, add a line to the records, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="Where they run (cpu).")
    device = parser.parse_args().device
    lambs = [record for candidate in CANDIDATES if (record := examined(candidate, device)) is not None]
    append_json_line(FILE, {"benchmark": "conformance", **stamp(), "lambs": lambs})
    write_tables(DOCUMENT, {MARKERS: table(recorded(FILE))})


if __name__ == "__main__":
    main()
