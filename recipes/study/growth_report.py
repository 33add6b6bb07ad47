"""The search and the table of recipes.grow_batch: a batch that grows, beside a constant one."""

from collections.abc import Sequence

from recipes.study.sweep import Record, Search, hardware_of, judged, search_behind, spread, standing, tuned
from recipes.study.tables import markdown_table

NAMES = {
    "constant": "constant batch",
    "equal-tokens": "growing batch, equal tokens",
    "equal-steps": "growing batch, equal steps",
}
HEADER = ("run", "steps", "sequences", "trials", "best rate", "held-out loss", "")


def search_of(optimizers: Sequence[str], settings: Sequence[str], seeds: int, first_rate: float = 2e-2) -> Search:
    """The search of every kind of run ends when its best rate lies between two worse ones, or after six rates."""
    ordered = [name for name in NAMES if name in settings]
    rates = {optimizer: first_rate for optimizer in optimizers}
    return Search(optimizers, ordered, rates, lambda rate, _: rate, seeds, least=3, most=6, judge_carried=False)


def results_of(records: list[Record]) -> list[str]:
    """What was run, and the table of it, in Markdown."""
    facts, search = records[0]["study"], search_behind(records, search_of)
    parts = {name: _runs(search, records, name) for name in search.settings}
    losses = {name: spread([run["objective"] for run in runs]) for name, runs in parts.items()}
    rows = []
    for name, runs in parts.items():
        best = tuned(search, records, "lamb", name)
        steps, sequences = f"{runs[0]['steps']:,}", f"{runs[0]['sequences']:,}"
        place = standing(losses[name], list(losses.values()))
        rows.append([NAMES[name], steps, sequences, str(best.trials), best.rate_in_words, str(losses[name]), place])
    batch = facts["global_batch_size"]
    words = (
        f"{facts['model']}, {records[0]['parameters']:,} parameters, {facts['max_seq_length']} tokens; constant batch "
        f"{batch}, or one that grows linearly from {batch // 4} to {batch} over the run, with the rate of each step's "
        "batch by the sqrt rule. Held-out loss at the best rate of at least three, which are factors of two apart: "
        f"mean ± standard deviation over {search.seeds} seeds that played no part in the tuning. At most two standard "
        f"deviations (pooled) apart is a tie. {len(records)} runs on {hardware_of(records)}: "
        f"`{records[0]['command']}`."
    )
    return [words, markdown_table(HEADER, rows)]


def _runs(search: Search, records: Sequence[Record], name: str) -> list[Record]:
    return judged(search, records, "lamb", name, tuned(search, records, "lamb", name).learning_rate)
