"""Parts 1 and 2 of sharp_minima: a small network on scikit-learn's digits, and one function in other weights."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_lamb import Lamb, lamb_param_groups
from hf_lamb.sharpness import (
    adaptive_sharpness,
    alpha_scale,
    cross_entropy,
    epsilon_flatness,
    epsilon_sharpness,
    hessian_trace,
    interpolate,
    lambda_max,
    weighted_trace,
)
from recipes.lib.images import digits as all_digits
from recipes.study.sweep import shuffled

# Part 1. Four rates for every optimizer and batch size, two times apart; the one with the lowest validation loss is
# run again with two more seeds.
SMALL, LARGE = 16, 1200
RATES = {
    ("lamb", SMALL): (2.5e-3, 5e-3, 1e-2, 2e-2),
    ("lamb", LARGE): (2.5e-3, 5e-3, 1e-2, 2e-2),
    ("adamw", SMALL): (2.5e-3, 5e-3, 1e-2, 2e-2),
    ("adamw", LARGE): (1.25e-3, 2.5e-3, 5e-3, 1e-2),
    ("sgd", SMALL): (2.5e-2, 5e-2, 1e-1, 2e-1),
    ("sgd", LARGE): (5e-2, 1e-1, 2e-1, 4e-1),
}
# Steps times rate that were found to lead to the target: where the search for the number of steps begins.
PROGRESS = {
    ("lamb", SMALL): 9.8,
    ("lamb", LARGE): 4.8,
    ("adamw", SMALL): 10.0,
    ("adamw", LARGE): 2.1,
    ("sgd", SMALL): 110,
    ("sgd", LARGE): 152,
}
TARGET = 0.01  # nats of training loss, at which all networks are compared
SETTLED = 0.04  # relative distance from the target that counts as reached
SEEDS = (0, 1, 2)
ON_THE_WAY = (0.1, 0.03)  # losses at which runs of the chosen rates end as well, for sharpness against loss
# The same large-batch run, trained on: what a comparison at unequal loss would say.
FURTHER = 0.001

ALPHAS = (0.2, 1.0, 2.0, 5.0, 10.0)


class Digits(NamedTuple):
    """(images [rows, 64] in [0, 1], classes [rows]) to train on, to choose rates by, and to report."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Run(NamedTuple):
    """What determines a run of part 1."""

    optimizer: str
    batch_size: int
    rate: float
    seed: int = 0
    target: float = TARGET

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.batch_size}-{self.rate:g}-{self.seed}-{self.target:g}"


def load_digits() -> Digits:
    """1,200, 297 and 300 of scikit-learn's images, in an order drawn once."""
    every = all_digits()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    x, y = every.take(order)
    x = x.flatten(1)
    return Digits((x[:1200], y[:1200]), (x[1200:1497], y[1200:1497]), (x[1497:], y[1497:]))


def network(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """64 - 128 - 10."""
    return nn.Sequential(nn.Linear(64, 128), activation(), nn.Linear(128, 10))


# -- part 1: to one training loss with every optimizer and batch size ------------------------------------------------


def digits_runs(keep: Callable[..., Any], processes: int) -> dict[Run, dict[str, Any]]:
    """All runs: every rate with one seed, the best rate of each with all seeds, and one trained on."""
    sweep = [Run(optimizer, size, rate) for (optimizer, size), rates in RATES.items() for rate in rates]
    runs = run_all(sweep, keep, processes, "digits, rates")
    again = [best(optimizer, size, runs) for optimizer, size in RATES]
    more = [run._replace(seed=seed) for run in again for seed in SEEDS[1:]]
    more += [run._replace(target=target) for run in again for target in ON_THE_WAY]
    more.append(best("adamw", LARGE, runs)._replace(target=FURTHER))
    return runs | run_all(more, keep, processes, "digits, seeds")


def run_all(runs: list[Run], keep: Callable[..., Any], processes: int, title: str) -> dict[Run, dict[str, Any]]:
    """Several at a time, each in a process with one thread; what is there already is not run again."""
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = pool.imap_unordered(partial(_run_kept, keep), runs)
        found = dict(tqdm(done, total=len(runs), desc=title, unit="run", disable=None))
        pool.close()
        pool.join()  # left to itself, `with` kills the processes, and what they had opened with them
    return {run: found[run] for run in runs}


def _run_kept(keep: Callable[..., Any], run: Run) -> tuple[Run, dict[str, Any]]:
    return run, keep(run.name, partial(train_to_target, run))


def best(optimizer: str, batch_size: int, runs: dict[Run, dict[str, Any]]) -> Run:
    """The run of the sweep with the lowest validation loss among those that reached the target."""
    candidates = [run for run in runs if run[:2] == (optimizer, batch_size) and run[3:] == (0, TARGET)]
    return min(
        candidates, key=lambda run: (not runs[run]["record"]["settled"], runs[run]["record"]["validation_loss"])
    )


def train_to_target(run: Run, most_steps: int = 8000, trials: int = 10) -> dict[str, Any]:
    """Train with a number of steps such that the run, rate warmed up and decayed to zero, ends at the target loss.

    Stopping a run at the target would leave it where its rate is still high, off the floor of its valley, and
    sharpness would measure that. So the number of steps is found by trial: interpolating the logarithms.
    """
    digits = load_digits()
    guess = PROGRESS[run.optimizer, run.batch_size] / run.rate * (TARGET / run.target) ** 0.45
    steps, below, above = min(round(guess), most_steps), None, None
    closest: tuple[float, nn.Sequential, list[list[float]], int] | None = None
    for _ in range(trials):
        model, curve = train(run, steps, digits)
        error = math.log(curve[-1][2] / run.target)
        if closest is None or abs(error) < abs(closest[0]):
            closest = (error, model, curve, steps)
        more_do_not_help = error > 0 and (steps == most_steps or (below is not None and error >= below[1]))
        if abs(math.expm1(error)) <= SETTLED or more_do_not_help:
            break
        if error > 0:
            below = (steps, error)
        else:
            above = (steps, error)
        if below and above:
            share = below[1] / (below[1] - above[1])
            steps = round(below[0] * (above[0] / below[0]) ** share)
            steps = min(max(steps, below[0] + 1), above[0] - 1)
        else:
            steps = min(math.ceil(steps * (1.8 if below else 0.5)), most_steps)
    assert closest is not None
    error, model, curve, steps = closest
    record = {
        "part": "digits",
        **run._asdict(),
        "steps": steps,
        "epochs": steps * run.batch_size / len(digits.train[0]),
        "settled": abs(math.expm1(error)) <= SETTLED,
        **measure(model, digits),
    }
    return {"record": record, "weights": model.state_dict(), "curve": curve}


def train(
    run: Run, steps: int, digits: Digits, activation: type[nn.Module] = nn.ReLU
) -> tuple[nn.Sequential, list[list[float]]]:
    """(the network, its curve); rows of the curve: step, epoch, training loss, validation loss, sharpness."""
    torch.manual_seed(run.seed)
    model = network(activation)
    optimizer = make_optimizer(run, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
    )
    (images, classes), curve = digits.train, []
    looks = {round(steps ** (i / 9)) for i in range(10)} | {round(steps * i / 8) for i in range(1, 9)}
    batches = shuffled(len(images), steps * run.batch_size, run.seed).split(run.batch_size)
    for step, rows in enumerate(batches, 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), classes[rows]).backward()
        optimizer.step()
        schedule.step()
        if step in looks:
            sharpness = adaptive_sharpness(model, cross_entropy, [digits.train], steps=5)
            validation = loss_and_accuracy(model, digits.validation)[0]
            epoch = step * run.batch_size / len(images)
            curve.append([step, epoch, sharpness.loss, validation, sharpness.value])
    return model, curve


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """LAMB and AdamW with the same decay of the same parameters; SGD with momentum 0.9 and without decay."""
    groups = lamb_param_groups(model, weight_decay=0.01)
    if run.optimizer == "lamb":
        return Lamb(groups, lr=run.rate)
    if run.optimizer == "adamw":
        plain = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
        return torch.optim.AdamW(plain, lr=run.rate, eps=1e-6)
    return torch.optim.SGD(model.parameters(), lr=run.rate, momentum=0.9)


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the share that was classified right."""
    result = cross_entropy(model, data)
    return result.loss.item(), float(result.correct) / len(data[1])


def measure(model: nn.Module, digits: Digits) -> dict[str, float]:
    """Losses, accuracies and every metric on the training set."""
    data = (model, cross_entropy, [digits.train])
    adaptive, keskar = adaptive_sharpness(*data), epsilon_sharpness(*data)
    flatness = epsilon_flatness(*data)
    record = {}
    for split in Digits._fields:
        record[f"{split}_loss"], record[f"{split}_accuracy"] = loss_and_accuracy(model, getattr(digits, split))
    return record | {
        "adaptive": adaptive.value,
        "adaptive_slope": adaptive.slope,
        "keskar": keskar.value,
        "keskar_slope": keskar.slope,
        "keskar_subspace": epsilon_sharpness(*data, subspace=100).value,
        "flatness_median": flatness.median,
        "flatness_worst": flatness.worst,
        "lambda_max": lambda_max(*data).value,
        "trace": hessian_trace(*data).value,
        "weighted_trace": weighted_trace(*data).value,
    }


def digits_paths(runs: dict[Run, dict[str, Any]]) -> dict[str, Any]:
    """From the small batch's network to the large batch's, for every optimizer: training and test data."""
    digits, paths = load_digits(), {}
    for optimizer in ("lamb", "adamw", "sgd"):
        ends = []
        for size in (SMALL, LARGE):
            model = network()
            model.load_state_dict(runs[best(optimizer, size, runs)]["weights"])
            ends.append(model)
        paths[optimizer] = [
            [list(point) for point in interpolate(*ends, cross_entropy, [split])]
            for split in (digits.train, digits.test)
        ]
    return paths


# -- part 2: other weights, the same function ------------------------------------------------------------------------


def dinh(weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Every metric of (αA, B/α) for each α, and how far its logits are from the network's own."""
    digits, model = load_digits(), network()
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(digits.train[0])
        records = []
        for alpha in ALPHAS:
            scaled = alpha_scale(model, alpha, "0", "2", digits.train[0])
            difference = (scaled(digits.train[0]) - logits).abs().max().item()
            records.append(
                {"part": "dinh", "alpha": alpha, "logits_difference": difference, **measure(scaled, digits)}
            )
    return records


def negated_path() -> dict[str, Any]:
    """From a tanh network with the layers (A, B) to (-A, -B), which is the same function: the line and the ends."""
    digits = load_digits()
    model, _ = train(Run("adamw", SMALL, 5e-3), 1500, digits, nn.Tanh)
    negated = alpha_scale(model, -1, "0", "2", digits.train[0])
    points = interpolate(model, negated, cross_entropy, [digits.train])
    record: dict[str, Any] = {"part": "negated"}
    for name, end in (("(A, B)", model), ("(-A, -B)", negated)):
        adaptive, keskar = (
            metric(end, cross_entropy, [digits.train]) for metric in (adaptive_sharpness, epsilon_sharpness)
        )
        record[name] = {"train_loss": adaptive.loss, "adaptive": adaptive.value, "keskar": keskar.value}
    record["highest_loss_between"] = max(point.loss for point in points if 0 <= point.alpha <= 1)
    return {"record": record, "path": [list(point) for point in points]}
