"""What `benchmarks.gpu_proof` has recorded, in Markdown."""

from collections.abc import Callable
from typing import Any

from benchmarks.bench_step import CLIPPED, CLIPPED_ADAMW
from benchmarks.records import Record, newest
from benchmarks.step_tables import measured, table_of_steps
from recipes.study.tables import markdown_table

NOT_RUN = "Not run: there is no record of a GPU yet.\n"
# The keys of the rows of these parts, and the heads of their columns.
LAUNCHES = {
    "launches": "launches",
    "launches_with_moved_gradients": "with gradients elsewhere",
    "milliseconds_on_device": "ms on the device",
    "milliseconds_of_host": "ms of the host",
    "megabytes_of_a_step": "MB in a step",
    "bytes_of_state_a_parameter": "bytes of state a parameter",
}
SHARDED = {
    "milliseconds_min": "ms",
    "ratio_of_minima": "/ AdamW fused",
    "collectives": "collectives",
    "launches": "launches",
}
EXACT = {
    "same_bits_twice": "two runs give the same bits",
    "capture_equals_eager": "a captured step equals the eager one",
}


def gpu_report(records: list[Record]) -> str:
    """A section for each machine, with the newest record of each kind; dry runs do not count."""
    machines: dict[str, list[Record]] = {}
    for record in records:
        if not record["dry"]:
            machines.setdefault(record["hardware"], []).append(record)
    if not machines:
        return NOT_RUN
    return "\n".join(section(hardware, of) for hardware, of in machines.items())


def section(hardware: str, records: list[Record]) -> str:
    """Of one machine: how its parts ended, and their numbers."""
    parts: dict[str, list[Record]] = {}
    for record in newest(records, "part", "shapes", "dtype"):
        parts.setdefault(record["part"], []).append(record)
    ends = [record for part, (record, *_) in parts.items() if part.startswith("end of ")]
    versions = {
        f"{name} {record['versions'][name]}"
        for record in ends
        for name in ("python", "torch", "cuda", "triton", "transformers", "accelerate")
    }
    texts = [f"## {hardware}\n", ", ".join(sorted(versions)) + ".\n", markdown_table(*ends_of(ends))]
    tables: dict[str, Callable[[list[Record]], str]] = {
        "tests": tests_of,
        "steps": steps_of,
        "launches": lambda found: rows_of(found[0], LAUNCHES),
        "exact": exact_of,
        "sharded": sharded_of,
        "recipe": recipe_of,
    }
    return "\n".join([*texts, *(table(parts[part]) for part, table in tables.items() if part in parts)])


def ends_of(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for record in records:
        outcome = "done" if record["ok"] else f"failed: {record['last_line']}".replace("|", "/")
        rows.append([record["part"].removeprefix("end of "), outcome, f"{record['seconds']:.0f}", measured(record)])
    return ["part", "outcome", "seconds", "measured"], rows


def tests_of(records: list[Record]) -> str:
    return "Tests on the GPU: " + ", ".join(f"{n} {word}" for word, n in records[0]["counts"].items()) + ".\n"


def steps_of(records: list[Record]) -> str:
    """The table of `bench_step`, and what clipping costs beside AdamW with clipping."""
    heads, ratios = ["with clipping in both"], ["hf_lamb / AdamW fused"]
    for record in records:
        ours, adamw = (record["steps"][name]["milliseconds_min"] for name in (CLIPPED, CLIPPED_ADAMW))
        heads.append(f"{record['shapes']}, {record['dtype']}")
        ratios.append(f"{ours / adamw:.2f}")
    return table_of_steps(records) + "\n" + markdown_table(heads, [ratios])


def rows_of(record: Record, columns: dict[str, str]) -> str:
    """A row for each row of a record; empty where it has no such number."""
    rows = [[name, *(number(row.get(key)) for key in columns)] for name, row in record["rows"].items()]
    return markdown_table([f"{record['tensors']} tensors", *columns.values()], rows)


def number(value: Any) -> str:
    return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def exact_of(records: list[Record]) -> str:
    rows = [[record["dtype"], *("yes" if record[key] else "no" for key in EXACT)] for record in records]
    return markdown_table(["", *EXACT.values()], rows)


def sharded_of(records: list[Record]) -> str:
    (record,) = records
    waits = "The host waits for nothing" if record["host_waits"] is None else f"The host waits: {record['host_waits']}"
    return (
        "FSDP2 on one GPU whose group of one process communicates. The largest ‖Δw‖/‖w‖ to the unsharded run after "
        f"three steps is {record['worst_difference']:.0e}. {waits}.\n\n{rows_of(record, SHARDED)}"
    )


def recipe_of(records: list[Record]) -> str:
    (record,) = records
    rows = [
        [name, " and ".join(f"{rate:,.0f}" for rate in row["tokens_per_second"]), number(row["peak_gigabytes"])]
        for name, row in record["rows"].items()
    ]
    options = " ".join(f"--{key} {value}" for key, value in record["options"].items())
    return f"`recipes.pretrain_bert {options}`:\n\n" + markdown_table(["", "tokens a second", "GB at most"], rows)
