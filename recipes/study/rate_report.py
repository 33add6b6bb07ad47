"""The search of recipes.find_rate, and what it ends with: a rate for each optimizer, a curve, what it cost."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipes.lib.console import what_next
from recipes.lib.optimizers import NAMES
from recipes.lib.report import atomic_write, plain_log
from recipes.study.plots import legend_below, picture, style_of
from recipes.study.sweep import Record, Search, Study, Tuned, hardware_of, objective_of, trial_of, tuned
from recipes.study.tables import TUNED, markdown_table, tuned_cells

# The recipe's --optim of each optimizer.
OPTIM = {"lamb": "lamb", "adamw": "adamw_torch_fused"}

# Of rates whose losses are this close to the best, in nats, the lowest is taken: a longer run wants lower rates, and
# the loss grows faster above the best rate than below it.
TIE = 0.01


def search_at(batch_size: int, first_rates: Mapping[str, float]) -> Search:
    """A search at one batch size, with one seed; every optimizer gets as many trials as the others."""
    return Search(list(first_rates), [batch_size], first_rates, carry=lambda rate, _: rate, seeds=0)


def write_report(study: Study, records: Sequence[Record], model: Mapping[str, Any]) -> str:
    """Write NAME.yaml for each optimizer and rates.png; return what is to be printed.

    model: the options of the recipe that the rates belong to: model, data, what the optimizer was given.
    """
    (batch_size,) = study.search.settings
    best = {o: lowest_of_the_best(study, records, o) for o in study.search.optimizers}
    for optimizer, found in best.items():
        if math.isfinite(found.objective):
            write_rate(
                study.folder / f"{optimizer}.yaml", records, found, batch_size, model | {"optim": OPTIM[optimizer]}
            )
    draw(study, records, best, study.folder / "rates.png")
    rows = [[*tuned_cells(o, found), *losses(study, records, o, found)] for o, found in best.items()]
    header = [*TUNED, "loss", "at half the rate", "at twice the rate"]
    lines = [markdown_table(header, rows), cost(records)]
    lines += [in_words(o, found, batch_size, study.folder) for o, found in best.items()]
    lines += [f"curve: {study.folder / 'rates.png'}", ""]
    found = [o for o in best if math.isfinite(best[o].objective)]
    commands = {
        f"train with {NAMES[o]}": f"python -m recipes.pretrain_bert --plan {study.folder / o}.yaml" for o in found
    }
    if "lamb" in found:
        commands["a large batch"] = f"hf-lamb plan --global_batch_size 4096 --rate {study.folder / 'lamb'}.yaml"
    lines += [what_next(commands)] if commands else []
    return "\n".join(lines)


def lowest_of_the_best(study: Study, records: Sequence[Record], optimizer: str) -> Tuned:
    """The best rate, or the lowest one whose loss is within TIE of it."""
    (batch_size,) = study.search.settings
    best = tuned(study.search, records, optimizer, batch_size)
    tried = study.search.tried({trial_of(r): objective_of(r) for r in records}, optimizer, batch_size)
    rate = min(rate for rate, loss in tried.items() if loss <= best.objective + TIE)
    return best._replace(learning_rate=rate, objective=tried[rate], interior=best.interior and rate / 2 in tried)


def in_words(optimizer: str, found: Tuned, batch_size: int, folder: Path) -> str:
    """The result as options of the recipe."""
    if not math.isfinite(found.objective):
        return f"{NAMES[optimizer]}: diverged at every rate"
    edge = "" if found.interior else ", the best that was tried, not one between two worse ones"
    options = (
        f"--optim {OPTIM[optimizer]} --base_learning_rate {found.learning_rate:.6g} --base_batch_size {batch_size}"
    )
    return f"{NAMES[optimizer]}: {options} (or --plan {folder / optimizer}.yaml){edge}"


def losses(study: Study, records: Sequence[Record], optimizer: str, found: Tuned) -> list[str]:
    """The loss, and by how much it rises at half and at twice the rate."""
    done = {trial_of(record): objective_of(record) for record in records}
    tried = study.search.tried(done, optimizer, study.search.settings[0])
    cells = [f"{found.objective:.3f}" if math.isfinite(found.objective) else "diverged"]
    for rate in (found.learning_rate / 2, found.learning_rate * 2):
        rise = tried.get(rate, math.nan) - found.objective
        cells.append(f"{rise:+.3f}" if math.isfinite(rise) else "diverged" if math.isinf(rise) else "not tried")
    return cells


def cost(records: Sequence[Record]) -> str:
    """Runs, minutes of training, tokens, and on what."""
    minutes, tokens = (sum(record[name] for record in records) for name in ("seconds", "tokens"))
    return (
        f"cost: {len(records)} runs of {records[0]['steps']:,} steps, {minutes / 60:.1f} minutes, {tokens / 1e6:.3g} "
        f"million tokens, on {hardware_of(records)}\n"
    )


def write_rate(
    path: Path, records: Sequence[Record], found: Tuned, batch_size: int, options: Mapping[str, Any]
) -> None:
    """Write what `recipes.pretrain_bert --plan` and `hf_lamb.plan --rate` read."""
    rate = {"base_learning_rate": float(f"{found.learning_rate:.6g}"), "base_batch_size": batch_size}
    where = "between two worse rates" if found.interior else "at the end of what was tried"
    comment = f"# found by: {records[-1]['command']}\n# {found.trials} runs; {where}"
    with atomic_write(path) as unfinished:
        unfinished.write_text(f"{comment}\n{yaml.safe_dump(dict(options) | rate, sort_keys=False)}")


def draw(study: Study, records: Sequence[Record], best: Mapping[str, Tuned], path: Path) -> None:
    """Held-out loss against the rate; of rates that diverged a mark on the upper edge."""
    done = {trial_of(record): objective_of(record) for record in records}
    (batch_size,) = study.search.settings
    with picture(path, size=(7, 4.5)) as (figure, axes):
        axis = axes[0, 0]
        for optimizer, found in best.items():
            tried = study.search.tried(done, optimizer, batch_size)
            finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
            axis.plot(list(finite), list(finite.values()), **style_of(optimizer), label=NAMES[optimizer])
            if finite:
                axis.axvline(found.learning_rate, color=style_of(optimizer)["color"], linewidth=0.8, linestyle=":")
            for rate in tried.keys() - finite.keys():
                axis.plot(
                    rate, 0.97, transform=axis.get_xaxis_transform(), color=style_of(optimizer)["color"], marker="x"
                )
        crosses = "; crosses diverged" if math.inf in done.values() else ""
        axis.set_xscale("log")
        plain_log(axis.xaxis)
        axis.grid(alpha=0.25)
        axis.set_xlabel("peak learning rate")
        axis.set_ylabel("held-out loss (nats)")
        axis.set_title(f"batch {batch_size:,}, {records[0]['steps']:,} steps{crosses}")
        legend_below(figure, axis)
