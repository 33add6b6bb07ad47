"""Writes the tables and the picture of what a step costs, from the committed records.

python -m benchmarks.tables
"""

from collections.abc import Callable
from json import loads
from pathlib import Path
from typing import Any

from recipes.lib.report import no_options
from recipes.study.plots import picture, plain_log
from recipes.study.tables import ROOT, write_tables

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


def step_table(records: list[Record]) -> str:
    """One row an optimizer, one column a set of tensors: ratio of minima to AdamW(fused=True), and scratch memory."""
    names = list(dict.fromkeys(name for record in records for name in record["steps"]))
    heads = [f"{record['shapes']}, {record['dtype']}" for record in records]
    lines = ["| | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for name in names:
        cells = [cell(record["steps"].get(name)) for record in records]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for key, label in (("copy", "a copy"), ("adamw", "AdamW fused")):
        rates = [f"{record[f'gigabytes_per_second_{key}']:.0f} GB/s" for record in records]
        lines.append(f"| {label} moves | " + " | ".join(rates) + " |")
    return "\n".join(lines) + "\n"


def cell(row: dict[str, float] | None) -> str:
    if row is None:
        return ""
    return f"{row['ratio_of_minima']:.2f} ({row['ratio_of_medians']:.2f}), {row['scratch_megabytes']:,.0f} MB"


def draw_steps(records: list[Record], path: Path) -> None:
    """Bars of the ratio of minima to AdamW(fused=True), and a dot for that of medians; a panel a set of tensors."""
    names = list(dict.fromkeys(name for record in records for name in record["steps"]))[::-1]
    size = (3.2 * len(records) + 2, 0.32 * len(names) + 1.4)
    with picture(path, columns=len(records), size=size, sharey=True, sharex=True) as (figure, axes):
        for axis, record in zip(axes[0], records, strict=True):
            rows = {name: record["steps"][name] for name in names if name in record["steps"]}
            ours = ["#0072B2" if name.startswith("hf_lamb") else "#BBBBBB" for name in rows]
            minima = [row["ratio_of_minima"] for row in rows.values()]
            axis.barh(list(rows), minima, color=ours)
            medians = [row["ratio_of_medians"] for row in rows.values()]
            axis.plot(medians, list(rows), "o", color="black", markersize=3)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_xscale("log")
            plain_log(axis.xaxis)
            axis.set_title(f"{record['shapes']}, {record['dtype']}", fontsize=10)
        figure.supxlabel("time of a step / AdamW(fused=True): fastest step (bar), median (dot)", fontsize=10)


def sharded_table(records: list[Record]) -> str:
    """One row an optimizer, one column a number of processes: ratio of medians, and collectives a step."""
    heads = [f"{record['processes']} processes" for record in records]
    lines = ["| | collectives | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 2) + "|"]
    for name, row in records[0]["steps"].items():
        cells = [
            f"{record['steps'][name]['milliseconds']:,.0f} ms, {record['steps'][name]['ratio_to_adamw_foreach']:.2f}"
            for record in records
        ]
        lines.append(f"| {name} | {row['collectives']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def trainer_table(records: list[Record]) -> str:
    """One row a run of `bench_trainer`."""
    lines = ["| BERT | micro-batch x accumulation | milliseconds a step | in LambTrainer's extras |"]
    lines.append("| --- | --- | --- | --- |")
    for record in records:
        split = f"{record['per_device_train_batch_size']} x {record['gradient_accumulation_steps']}"
        milliseconds, share = record["seconds_per_step"] * 1e3, record["share_of_extras"]
        lines.append(f"| {record['size']} | {split} | {milliseconds:,.0f} | {share:.2%} |".replace("%", " %"))
    return "\n".join(lines) + "\n"


# {file: {name of the markers: (name of the records, the table)}}
TABLES: dict[str, dict[str, tuple[str, Callable[[list[Record]], str]]]] = {
    "README.md": {"bench: step": ("step", step_table)},
    "docs/scaling.md": {"bench: sharded step": ("sharded_step", sharded_table)},
    "docs/large_batches.md": {"bench: trainer": ("trainer", trainer_table)},
}


def tables_of(file: str) -> dict[str, str]:
    """The tables of a file as they are recorded."""
    return {markers: table(recorded(name)) for markers, (name, table) in TABLES[file].items()}


def recorded(name: str) -> list[Record]:
    return [loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    no_options(__doc__)
    for file in TABLES:
        write_tables(file, tables_of(file))
    draw_steps(recorded("step"), ROOT / "docs/bench_step.png")
