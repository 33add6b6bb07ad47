"""The tables of what a step costs, in Markdown."""

from benchmarks.records import Record, newest


def step_table(records: list[Record]) -> str:
    """A table for each machine, with the newest record of each set of tensors.

    One row an optimizer, one column a set of tensors: ratio of minima to AdamW(fused=True), and scratch memory.
    """
    machines: dict[str, list[Record]] = {}
    for record in newest(records, "shapes", "dtype", "hardware"):
        machines.setdefault(record["hardware"], []).append(record)
    return "\n".join(f"{hardware}:\n\n{table_of_steps(of)}" for hardware, of in machines.items())


def table_of_steps(records: list[Record]) -> str:
    """Of one machine."""
    names = list(dict.fromkeys(name for record in records for name in record["steps"]))
    heads = [f"{record['shapes']}, {record['dtype']}" for record in records]
    lines = ["| | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for name in names:
        cells = [cell(record["steps"].get(name)) for record in records]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for label, rates in (
        ("a copy", [record["gigabytes_per_second_copy"] for record in records]),
        ("AdamW fused", [moved_by_adamw(record) for record in records]),
    ):
        lines.append(f"| {label} moves | " + " | ".join(f"{rate:.0f} GB/s" for rate in rates) + " |")
    lines.append("| measured | " + " | ".join(map(measured, records)) + " |")
    return "\n".join(lines) + "\n"


def moved_by_adamw(record: Record) -> float:
    """GB/s: it reads w, g, m, v and writes w, m, v, all in the parameters' dtype."""
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[record["dtype"]]
    return 7 * size * record["parameters"] / record["steps"]["torch AdamW fused"]["milliseconds_min"] / 1e6


def measured(record: Record) -> str:
    """The day, and the commit where it is recorded."""
    return ", ".join([record["time"][:10], *([record["commit"]] if "commit" in record else [])])


def cell(row: dict[str, float] | None) -> str:
    if row is None:
        return ""
    return f"{row['ratio_of_minima']:.2f} ({row['ratio_of_medians']:.2f}), {row['scratch_megabytes']:,.0f} MB"
