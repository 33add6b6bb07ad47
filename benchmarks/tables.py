"""Writes the tables and pictures of what a step costs, from the committed records: the newest, and their history.

python -m benchmarks.tables
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from matplotlib.dates import ConciseDateFormatter

from benchmarks.gpu_tables import gpu_report
from benchmarks.records import RESULTS, ROOT, Record, newest, recorded
from benchmarks.step_tables import step_table
from recipes.lib.report import no_options, plain_log
from recipes.study.plots import legend_below, picture
from recipes.study.tables import write_tables


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
            axis.set_title(f"{record['shapes']}, {record['dtype']}\n{record['hardware']}", fontsize=10)
        figure.supxlabel("time of a step / AdamW(fused=True): fastest step (bar), median (dot)", fontsize=10)


HISTORIES = {"hf_lamb fused": "with skip_nonfinite", "hf_lamb fused, skip_nonfinite=False": "without"}


def draw_history(records: list[Record], path: Path) -> None:
    """The ratio of minima to AdamW(fused=True) by date: a row a machine, a line a set of tensors."""
    machines = list(dict.fromkeys(record["hardware"] for record in records))
    kinds = list(dict.fromkeys((record["shapes"], record["dtype"]) for record in records))
    size = (11, 3.6 * len(machines) + 0.6)
    with picture(path, columns=len(HISTORIES), rows=len(machines), size=size, sharex="row", sharey="row") as drawing:
        figure, grid = drawing
        for machine, axes in zip(machines, grid, strict=True):
            for (row, title), axis in zip(HISTORIES.items(), axes, strict=True):
                for number, kind in enumerate(kinds):
                    points = sorted(
                        (datetime.fromisoformat(record["time"]), record["steps"][row]["ratio_of_minima"])
                        for record in records
                        if record["hardware"] == machine
                        and (record["shapes"], record["dtype"]) == kind
                        and row in record["steps"]
                    )
                    dates, ratios = zip(*points, strict=True) if points else ((), ())
                    axis.plot(dates, ratios, marker="osD^v<>P"[number % 8], label=", ".join(kind))
                axis.axhline(1, color="black", linewidth=0.8)
                axis.set_yscale("log")
                plain_log(axis.yaxis)
                axis.set_title(f"{title}; {machine}", fontsize=10)
                axis.xaxis.set_major_formatter(ConciseDateFormatter(axis.xaxis.get_major_locator()))
        figure.supylabel("fastest step / AdamW(fused=True)'s", fontsize=10)
        legend_below(figure, *grid.flat)


def sharded_table(records: list[Record]) -> str:
    """One row an optimizer, one column a number of processes: ratio of medians, and collectives a step."""
    records = newest(records, "processes", "hidden_size", "layers", "hardware")
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
    """One row a kind of run of `bench_trainer`, the newest of its kind."""
    records = newest(records, "size", "per_device_train_batch_size", "gradient_accumulation_steps", "hardware")
    lines = ["| BERT | micro-batch x accumulation | milliseconds a step | in LambTrainer's extras |"]
    lines.append("| --- | --- | --- | --- |")
    for record in records:
        split = f"{record['per_device_train_batch_size']} x {record['gradient_accumulation_steps']}"
        milliseconds, share = record["seconds_per_step"] * 1e3, record["share_of_extras"]
        lines.append(f"| {record['size']} | {split} | {milliseconds:,.0f} | {share:.2%} |".replace("%", " %"))
    return "\n".join(lines) + "\n"


# {file: {name of the markers: (name of the records, the table)}}
TABLES: dict[str, dict[str, tuple[str, Callable[[list[Record]], str]]]] = {
    "docs/speed.md": {"bench: step": ("step", step_table)},
    "docs/scaling.md": {"bench: sharded step": ("sharded_step", sharded_table)},
    "docs/large_batches.md": {"bench: trainer": ("trainer", trainer_table)},
    "docs/gpu.md": {"bench: gpu": ("gpu", gpu_report)},
}


def tables_of(file: str) -> dict[str, str]:
    """The tables of a file as they are recorded."""
    return {markers: table(recorded(RESULTS / f"{name}.jsonl")) for markers, (name, table) in TABLES[file].items()}


if __name__ == "__main__":
    no_options(__doc__)
    for file in TABLES:
        write_tables(file, tables_of(file))
    steps = recorded(RESULTS / "step.jsonl")
    draw_steps(newest(steps, "shapes", "dtype", "hardware"), ROOT / "docs/bench_step.png")
    draw_history(steps, ROOT / "docs/bench_history.png")
