"""What the branches of `recipes.critical_batch` say: the critical batch, in a table, a sentence and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.study.plots import picture
from recipes.study.sweep import Record
from recipes.study.tables import markdown_table

LAST = 4  # the smoothed loss is the mean over the last 1 / LAST of the window


def smoothed(losses: Sequence[float]) -> float:
    """The mean loss over the last quarter of the steps: the same sequences at every batch, also in parts of a step."""
    whole, part = divmod(len(losses) / LAST, 1)
    last = losses[len(losses) - int(whole) :]
    return (sum(last) + (part * losses[-int(whole) - 1] if part else 0.0)) / (whole + part)


def critical_batch(losses: dict[int, float], tolerance: float) -> int:
    """The largest batch whose loss is at most `tolerance` above that of every smaller batch."""
    batches = sorted(losses)
    return max(
        batch
        for i, batch in enumerate(batches)
        if all(losses[batch] <= losses[smaller] + tolerance for smaller in batches[:i])
    )


def table(records: list[Record]) -> str:
    """A row for each branch, in Markdown."""
    records = sorted(records, key=lambda record: record["batch"])
    first = records[0]["loss"]
    rows = [
        [
            f"{record['batch']:,}",
            f"{record['steps']:,}",
            f"{record['learning_rate']:.3g}",
            f"{record['loss']:.4f}",
            f"{record['loss'] - first:+.4f}".replace("-", "−"),
            f"{record['held_out_loss']:.4f}",
            f"{record['seconds']:,.0f}",
        ]
        for record in records
    ]
    header = ["batch", "steps", "rate", "smoothed loss", "above the smallest batch", "held-out loss", "seconds"]
    return markdown_table(header, rows)


def sentence(records: list[Record]) -> str:
    """The critical batch in words, and the noise scale beside it."""
    run = records[0]["run"]
    tolerance, tokens = run["tolerance"], run["sequences"] * run["max_seq_length"]
    losses = {record["batch"]: record["loss"] for record in records}
    found, batches = critical_batch(losses, tolerance), sorted(losses)
    if found == batches[-1]:
        words = (
            f"The critical batch is {found:,} sequences or more: after {tokens:,} tokens it is at most "
            f"{tolerance:g} nats above every smaller batch"
        )
    else:
        above = batches[batches.index(found) + 1]
        lost = losses[above] - min(losses[batch] for batch in batches if batch < above)
        below = "below" if found == batches[0] else f"between {found:,} and"
        words = (
            f"The critical batch is {below} {above:,} sequences: after {tokens:,} tokens {above:,} is {lost:.3f} nats "
            f"above a smaller batch, more than {tolerance:g}"
        )
    noise = run["noise_scale"]
    if noise is None:
        return f"{words}."
    return f"{words}. The noise scale of the checkpoint's gradients is {noise:,.3g} sequences."


def draw(records: list[Record], path: Path) -> None:
    """The smoothed loss against the batch, with the tolerance; and the loss along the window."""
    records = sorted(records, key=lambda record: record["batch"])
    batches, losses = [r["batch"] for r in records], [r["loss"] for r in records]
    run = records[0]["run"]
    with picture(path, columns=2, size=(10, 4)) as (_, axes):
        left, right = axes[0]
        left.plot(batches, losses, "o-", color="#0072B2", label="smoothed loss")
        best = [min(losses[: i or 1]) + run["tolerance"] for i in range(len(losses))]
        left.plot(batches, best, "--", color="#555555", label=f"best smaller batch + {run['tolerance']:g}")
        found = critical_batch(dict(zip(batches, losses, strict=True)), run["tolerance"])
        left.axvline(found, color="#D55E00", linewidth=1, label=f"{found:,}")
        left.set_xscale("log")
        left.set_xticks(batches, [f"{batch:,}" for batch in batches])
        left.minorticks_off()
        left.set_xlabel("global batch, sequences")
        left.set_ylabel("loss (nats)")
        left.legend()
        for record in records:
            tokens = [record["batch"] * run["max_seq_length"] * (i + 1) for i in range(len(record["losses"]))]
            right.plot(tokens, record["losses"], label=f"{record['batch']:,}", linewidth=1)
        right.axvspan(tokens[-1] * (1 - 1 / LAST), tokens[-1], color="#EEEEEE")
        right.set_xlabel("tokens since the checkpoint; grey: smoothed over")
        right.legend(title="batch")


def results_of(records: list[Any]) -> list[str]:
    """Table and sentence, for `recipes.tables_in_docs`."""
    return [table(records), sentence(records)]
