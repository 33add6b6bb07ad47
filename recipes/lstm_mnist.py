"""An LSTM reads images row by row, in small and in large batches: where papers about large batches begin.

    make lstm                                                            # scikit-learn's digits, batches 40 and 1,295
    python -m recipes.lstm_mnist --data_dir /usr/share/datasets/fashion-mnist --output_dir runs/fashion
    python -m recipes.lstm_mnist --epochs 300 --batch_sizes 1295 --output_dir runs/lstm-longer

Every optimizer is tuned as much as the others at every batch size, by the loss on a validation part; a study that was
stopped goes on. --data_dir takes a folder with the four files of MNIST, or of anything in its format, such as
that of Debian's package dataset-fashion-mnist.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from recipes.lib.console import study_command
from recipes.lib.images import Images, Split, load_images
from recipes.lib.optimizers import new_optimizer, rate_factor, set_rate
from recipes.lib.options import RecipeParser, parse_options
from recipes.study.lstm_report import FIRST_RATES, search_of, write_report
from recipes.study.sweep import Record, Study, Trial, check_over_batch_sizes, shuffled
from recipes.study.workers import complete


@dataclass
class LstmArguments:
    """What is compared; every run sees the training images as often."""

    output_dir: str = field(default="runs/lstm_mnist", metadata={"help": "The folder of the study."})
    data_dir: str | None = field(
        default=None, metadata={"help": "A folder with MNIST's four files; default: scikit-learn's digits."}
    )
    optimizers: list[str] = field(
        default_factory=lambda: list(FIRST_RATES), metadata={"help": f"Of {', '.join(FIRST_RATES)}."}
    )
    batch_sizes: list[int] | None = field(
        default=None, metadata={"help": "From small to large; default: 256 8192, or a 32nd of the digits and all."}
    )
    epochs: int = field(default=30, metadata={"help": "Times that a run sees every training image."})
    hidden_size: int = field(default=64, metadata={"help": "Units of the LSTM."})
    micro_batch_size: int = field(default=256, metadata={"help": "Images at once; a larger batch is accumulated."})
    evaluations: int = field(default=10, metadata={"help": "Points of every learning curve."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of weights, except with Adam, which has none."})
    seeds: int = field(default=3, metadata={"help": "Fresh seeds of the best rate, and of the untuned one."})
    use_cpu: bool = field(default=False, metadata={"help": "Use no accelerator."})
    report_only: bool = field(default=False, metadata={"help": "Run no trial; report those that are there."})


def main() -> None:
    """Run what is missing, then leave table, pictures and page in the output directory."""
    with study_command("lstm_mnist"):
        parser = RecipeParser(LstmArguments, "lstm_mnist", __doc__)
        (arguments,) = parse_options(parser)
        data = load_images(arguments.data_dir)
        if arguments.batch_sizes is None:
            every = len(data.train)
            arguments.batch_sizes = [256, 8192] if arguments.data_dir else [every // 32, every]
        check(arguments, data)
        study = Study(
            Path(arguments.output_dir),
            search_of(arguments.optimizers, arguments.batch_sizes, arguments.seeds),
            facts_of(arguments, data),
        )

        def prepare(device: torch.device) -> Callable[..., Record]:
            on_device = Split(*(part.to(device) for part in data))
            return partial(train_lstm, arguments=arguments, data=on_device)

        records = complete(study, prepare, arguments.use_cpu, arguments.report_only)
        if records is not None:
            print(write_report(study, records))


def check(arguments: LstmArguments, data: Split) -> None:
    """Raise ValueError for options that would fail later, or compare nothing."""
    check_over_batch_sizes(arguments, FIRST_RATES, ("epochs", "hidden_size", "micro_batch_size", "evaluations"))
    sizes = arguments.batch_sizes or []
    if max(sizes) > len(data.train):
        raise ValueError(f"--batch_sizes {max(sizes)} is more than the {len(data.train)} training images: lower it")
    if (steps := arguments.epochs * len(data.train) // max(sizes)) < arguments.evaluations:
        raise ValueError(
            f"--epochs {arguments.epochs} are {steps} steps at batch {max(sizes)}, fewer than --evaluations "
            f"{arguments.evaluations}: raise the epochs or lower the evaluations"
        )


def facts_of(arguments: LstmArguments, data: Split) -> Record:
    """What decides the outcome of a trial beside its optimizer, batch size, rate and seed."""
    deciding = ("epochs", "hidden_size", "evaluations", "weight_decay")
    name = Path(arguments.data_dir).resolve().name if arguments.data_dir else "digits (scikit-learn)"
    sizes = [len(part) for part in data]
    own = {"content": digest_of(data)} if arguments.data_dir else {}  # folders of torchvision's are all named raw
    return {"data": name, "images": sizes, **own, **{k: v for k, v in asdict(arguments).items() if k in deciding}}


def digest_of(data: Split) -> str:
    """The sha256 of pixels and labels."""
    sha256 = hashlib.sha256()
    for part in data:
        for tensor in part:
            sha256.update(tensor.numpy().tobytes())
    return sha256.hexdigest()


# -- a trial ----------------------------------------------------------------------------------------------------------


class RowReader(nn.Module):
    """An LSTM over the rows of an image and a linear layer on its last output; ten classes."""

    def __init__(self, columns: int, hidden_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(columns, hidden_size, batch_first=True)
        self.classify = nn.Linear(hidden_size, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, rows, columns] to logits [n, 10]."""
        outputs, _ = self.lstm(pixels)
        return self.classify(outputs[:, -1])


def train_lstm(trial: Trial, say: Callable[[str], None], arguments: LstmArguments, data: Split) -> Record:
    """Train an LSTM and return its curves.

    The seed decides weights and order; gradients are clipped to a norm of 1.
    """
    set_seed(trial.seed)
    device = data.train.labels.device
    model = RowReader(data.train.pixels.shape[2], arguments.hidden_size).to(device)
    optimizer = new_optimizer(trial.optimizer, model, trial.learning_rate, arguments.weight_decay)
    order = shuffled(len(data.train), arguments.epochs * len(data.train), trial.seed).to(device)
    steps = len(order) // trial.setting
    evaluate_at = {round(steps * (i + 1) / arguments.evaluations) for i in range(arguments.evaluations)}
    record: Record = {"steps": steps, "curve": []}
    for step in range(steps):
        batch = data.train.take(order[step * trial.setting : (step + 1) * trial.setting])
        for pixels, labels in zip(*(part.split(arguments.micro_batch_size) for part in batch), strict=True):
            loss = nn.functional.cross_entropy(model(pixels), labels)
            (loss * len(labels) / trial.setting).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_rate(optimizer, trial.learning_rate * rate_factor(step, steps))
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in evaluate_at:
            point = {"step": step + 1}
            for part in Split._fields:
                point[f"{part}_loss"], point[f"{part}_accuracy"] = score(model, getattr(data, part))
            if not math.isfinite(point["train_loss"]):
                return {"objective": None, **record}
            record["curve"].append(point)
            say(f"step {step + 1} of {steps}, test accuracy {point['test_accuracy']:.1%}")
    return {"objective": record["curve"][-1]["validation_loss"], **record}


@torch.no_grad()
def score(model: nn.Module, images: Images) -> tuple[float, float]:
    """(cross-entropy in nats, accuracy)."""
    logits = torch.cat([model(pixels) for pixels in images.pixels.split(1024)])
    loss = nn.functional.cross_entropy(logits, images.labels)
    accuracy = (logits.argmax(dim=1) == images.labels).double().mean()
    return round(loss.item(), 5), round(accuracy.item(), 5)


if __name__ == "__main__":
    main()
