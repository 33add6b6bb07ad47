"""The search and the report of recipes.finetune: table, picture and page, from the trials' records."""

from collections.abc import Sequence

from recipes.study import html_report
from recipes.study.plots import u_curves
from recipes.study.sweep import Record, Search, Spread, Study, hardware_of, outcomes, search_behind, spread, standing
from recipes.study.tables import TUNED, markdown_table, tuned_cells

# Where the search of the first start begins.
FIRST_RATES = {"lamb": 1e-2, "adamw": 5e-4, "sgd": 0.1}
STARTS = {"pretrained": "from the checkpoint", "scratch": "from scratch"}
HEADER = ("start", *TUNED, "test accuracy", "", "test macro F1")


def search_of(optimizers: Sequence[str], starts: Sequence[str], seeds: int) -> Search:
    """From scratch the search starts from the best rate of the checkpoint."""
    return Search(
        optimizers=optimizers,
        settings=starts,
        first_rates=FIRST_RATES,
        carry=lambda rate, start: rate,
        seeds=seeds,
        judge_carried=False,
    )


def results_of(records: list[Record]) -> list[str]:
    """What was run, and the table of it, in Markdown."""
    return [
        description(records),
        markdown_table(HEADER, rows_of(search_behind(records, search_of), records)),
    ]


def rows_of(search: Search, records: Sequence[Record]) -> list[list[str]]:
    """The table: every start and optimizer that has all its trials, then the baselines."""
    found = outcomes(search, records)
    rows = []
    for (start, optimizer), (best, runs) in found.items():
        accuracy, f1 = (tested(runs, name) for name in ("accuracy", "f1"))
        same_start = [tested(r, "accuracy") for (s, _), (_, r) in found.items() if s == start]
        place = standing(accuracy, same_start, highest=True, digits=1)
        rows.append([STARTS[start], *tuned_cells(optimizer, best), accuracy.per_cent, place, f1.per_cent])
    for name, scores in records[0]["baselines"].items():
        rows.append([name, "", "", "", f"{100 * scores['accuracy']:.1f} %", "", f"{100 * scores['f1']:.1f} %"])
    return rows


def tested(runs: Sequence[Record], metric: str) -> Spread:
    """A metric of the test part, in per cent."""
    return spread([100 * run["test"][metric] for run in runs])


def description(records: Sequence[Record]) -> str:
    facts = records[0]["study"]
    epochs = "1 epoch" if facts["epochs"] == 1 else f"{facts['epochs']} epochs"
    return (
        f"Task {facts['task']}: {facts['classes']} classes, {facts['train']:,} texts to train on, "
        f"{facts['validation']:,} to choose the rates by, {facts['test']:,} for testing. {facts['model']}, "
        f"{records[0]['parameters']:,} parameters, {epochs}, batch {facts['batch_size']}, "
        f"{facts['max_seq_length']} tokens. {len(records)} runs on {hardware_of(records)}."
    )


def write_report(study: Study, records: Sequence[Record]) -> str:
    """The picture and report.html in the study's folder; returns the report for the terminal."""
    search, folder, facts = study.search, study.folder, study.facts
    rows = rows_of(search, records)
    there = {record["setting"] for record in records}
    titles = {start: STARTS[start] for start in search.settings if start in there}
    errors = sorted(record["objective"] for record in records if record["objective"] is not None)
    carried = "where the search from scratch started"
    u_curves(folder / "u_curves.png", search, records, titles, "validation error rate", errors[-1], carried)
    what = description(records)
    notes = (
        f"Means ± standard deviations over {search.seeds} seeds that played no part in the tuning. At most two "
        "standard deviations (pooled) apart is a tie. Trials: learning rates tried, in factors of two, until the best "
        "has a worse neighbour on either side; the same number for both optimizers. The SVM reads whole texts."
    )
    u_curve = html_report.figure(
        folder / "u_curves.png",
        "Validation error against learning rate. Lines: the tuning runs. Bars: fresh seeds.",
    )
    title = f"Fine-tuning on {facts['task']}: LAMB and AdamW"
    return html_report.write_study(folder, title, records, what, (HEADER, rows), [notes], [u_curve])
