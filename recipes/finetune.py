"""Fine-tunes a BERT to classify texts, with LAMB and with AdamW, from a checkpoint and from scratch.

    make finetune                                                          # after `make pretrain`
    python -m recipes.finetune --task supersense --output_dir runs/supersense
    python -m recipes.finetune --task reviews.csv --model bert-base-uncased --starts pretrained --output_dir runs/mine

Both optimizers are tuned alike on a validation part; the best rates then run with fresh seeds, and the test part is
scored beside two baselines. A study that was stopped goes on.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.utils import set_seed
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from recipes.lib.console import study_command
from recipes.lib.optimizers import new_optimizer, rate_factor, set_rate
from recipes.lib.options import RecipeParser, parse_options
from recipes.lib.processes import autocast
from recipes.lib.tasks import PARTS, Example, Task, load_task
from recipes.study.finetune_report import FIRST_RATES, STARTS, search_of, write_report
from recipes.study.sweep import Record, Study, Trial, shuffled
from recipes.study.workers import complete


@dataclass
class FinetuneArguments:
    """Which model is fine-tuned on which task, and how."""

    output_dir: str = field(default="runs/finetune", metadata={"help": "The folder of the study."})
    task: str = field(
        default="topic", metadata={"help": "topic, supersense, a .csv, .json or .jsonl file, or glue:NAME."}
    )
    text_column: str = field(default="text", metadata={"help": "Of a file's rows."})
    label_column: str = field(default="label", metadata={"help": "Of a file's rows."})
    model: str = field(
        default="runs/pretrain_bert/tiny-lamb", metadata={"help": "A BERT's folder, with its tokenizer, or hub name."}
    )
    starts: list[str] = field(
        default_factory=lambda: list(STARTS),
        metadata={"help": "pretrained, scratch (the same architecture), or both."},
    )
    optimizers: list[str] = field(
        default_factory=lambda: ["lamb", "adamw"], metadata={"help": f"Of {', '.join(FIRST_RATES)}."}
    )
    epochs: int = field(default=3, metadata={"help": "Times that a run sees every training example."})
    batch_size: int = field(default=32, metadata={"help": "Texts in an optimizer step."})
    max_seq_length: int = field(default=32, metadata={"help": "Tokens that are read of a text."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of weights; biases and norms do not decay."})
    seeds: int = field(default=3, metadata={"help": "Fresh seeds of the best rate."})
    use_cpu: bool = field(default=False, metadata={"help": "Use no accelerator."})
    report_only: bool = field(default=False, metadata={"help": "Run no trial; report those that are there."})


class Encoded(NamedTuple):
    """One part of a task as tensors: the tokenizer's fields, [n, length] each, and class numbers, [n]."""

    fields: dict[str, Tensor]
    labels: Tensor

    def take(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Some rows, cut to the length of the longest of them."""
        length = int(self.fields["attention_mask"][rows].sum(dim=1).max())
        return {name: value[rows, :length] for name, value in self.fields.items()}, self.labels[rows]


def main() -> None:
    """Run what is missing, then leave table, picture and page in the output directory."""
    transformers.utils.logging.set_verbosity_error()  # it warns that the classifier is new, as it should be
    transformers.utils.logging.disable_progress_bar()
    with study_command("finetune"):
        parser = RecipeParser(FinetuneArguments, "finetune", __doc__)
        (arguments,) = parse_options(parser)
        check(arguments)
        task = load_task(arguments.task, arguments.text_column, arguments.label_column)
        if len(task.train) < arguments.batch_size:
            raise ValueError(
                f"--batch_size {arguments.batch_size} is more than the {len(task.train)} training examples of "
                f"{arguments.task}: lower it"
            )
        tokenizer, model = load_model(arguments, task)
        study = Study(
            Path(arguments.output_dir),
            search_of(arguments.optimizers, arguments.starts, arguments.seeds),
            facts_of(arguments, task, model),
        )

        def prepare(device: torch.device) -> Callable[..., Record]:
            parts = {part: encode(getattr(task, part), task, tokenizer, arguments, device) for part in PARTS}
            return partial(train_classifier, arguments=arguments, parts=parts, model=model, others=baselines(task))

        records = complete(study, prepare, arguments.use_cpu, arguments.report_only)
        if records is not None:
            print(write_report(study, records))


def check(arguments: FinetuneArguments) -> None:
    """Raise ValueError for options that would fail later, or compare nothing."""
    for option, known in (("optimizers", FIRST_RATES), ("starts", STARTS)):
        given = getattr(arguments, option)
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"--{option} {unknown[0]}: expected some of {', '.join(known)}")
        if not given or len(set(given)) < len(given):
            raise ValueError(f"--{option} {' '.join(given)}: expected some of {', '.join(known)}, each once")
    for option, least in {"epochs": 1, "batch_size": 1, "max_seq_length": 3, "seeds": 2}.items():
        if getattr(arguments, option) < least:
            raise ValueError(f"--{option} {getattr(arguments, option)}: expected at least {least}")


def facts_of(arguments: FinetuneArguments, task: Task, model: Any) -> Record:
    """What decides the outcome of a trial beside its optimizer, start, rate and seed."""
    deciding = ("task", "model", "epochs", "batch_size", "max_seq_length", "weight_decay")
    digest = hashlib.sha256()
    for name, weight in sorted(model.base_model.state_dict().items()):
        if not name.startswith("pooler."):  # new in every process where the checkpoint has none
            digest.update(weight.numpy().tobytes())
    sizes = {part: len(getattr(task, part)) for part in PARTS}
    kept = {name: value for name, value in asdict(arguments).items() if name in deciding}
    facts = {**kept, "model_sha256": digest.hexdigest()[:16], "classes": len(task.labels), **sizes}
    if Path(arguments.task).suffix:  # a file of the user's own
        facts["examples"] = task.digest
    return facts


def load_model(arguments: FinetuneArguments, task: Task) -> tuple[Any, Any]:
    """(tokenizer, model with a new classifier). Raises ValueError where there is none, or it reads too few tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForSequenceClassification.from_pretrained(
            arguments.model, num_labels=len(task.labels), dtype=torch.float32
        )
    except Exception as error:  # files of all kinds are read, by several libraries
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--model {arguments.model} cannot be loaded ({reason}): run `make pretrain` first, or name the folder of "
            "a BERT, or a hub model that can be reached"
        ) from None
    if arguments.max_seq_length > model.config.max_position_embeddings:
        raise ValueError(
            f"--max_seq_length {arguments.max_seq_length} is more than the {model.config.max_position_embeddings} "
            f"positions of {arguments.model}: lower it"
        )
    return tokenizer, model


def encode(
    examples: Sequence[Example], task: Task, tokenizer: Any, arguments: FinetuneArguments, device: torch.device
) -> Encoded:
    pairs = [example.pair for example in examples]
    fields = tokenizer(
        [example.text for example in examples],
        pairs if pairs[0] is not None else None,
        truncation=True,
        padding="max_length",
        max_length=arguments.max_seq_length,
        return_tensors="pt",
    )
    numbers = torch.tensor([task.labels.index(example.label) for example in examples])
    return Encoded({name: value.to(device) for name, value in fields.items()}, numbers.to(device))


# -- a trial ----------------------------------------------------------------------------------------------------------


def train_classifier(
    trial: Trial,
    say: Callable[[str], None],
    arguments: FinetuneArguments,
    parts: dict[str, Encoded],
    model: Any,
    others: dict[str, dict[str, float]],
) -> Record:
    """Fine-tune and return the scores, with those of the baselines (`others`).

    The seed decides new weights, order and dropout; gradients are clipped to a norm of 1.
    """
    set_seed(trial.seed)
    device, train = parts["train"].labels.device, parts["train"]
    model = fresh(model, trial.setting, arguments.model).to(device).train()
    optimizer = new_optimizer(trial.optimizer, model, trial.learning_rate, arguments.weight_decay)
    order = shuffled(len(train.labels), arguments.epochs * len(train.labels), trial.seed).to(device)
    steps = len(order) // arguments.batch_size
    total = 0.0
    for step in range(steps):
        fields, labels = train.take(order[step * arguments.batch_size : (step + 1) * arguments.batch_size])
        with autocast(device):
            loss = model(**fields, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_rate(optimizer, trial.learning_rate * rate_factor(step, steps))
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % max(1, steps // 20) == 0:
            say(f"step {step + 1} of {steps}, mean loss {total / (step + 1):.3f} nats")
    scores = {part: score(model, parts[part]) for part in ("validation", "test")}
    record = {"steps": steps, "parameters": model.num_parameters(), **scores, "baselines": others}
    return {"objective": 1 - scores["validation"]["accuracy"] if math.isfinite(total) else None, **record}


def fresh(model: Any, start: str, name: str) -> Any:
    """A new model in float32: the checkpoint's weights under a new classifier, or all weights new."""
    if start == "scratch":
        return AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32)
    return AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=model.config.num_labels, dtype=torch.float32
    )


@torch.no_grad()
def score(model: Any, part: Encoded) -> dict[str, float]:
    """Accuracy and macro F1."""
    from recipes.lib.metrics import Classification

    model.eval()
    metric = Classification()
    for rows in torch.arange(len(part.labels), device=part.labels.device).split(256):
        fields, labels = part.take(rows)
        metric.add_batch(predictions=model(**fields).logits.argmax(dim=1).cpu(), references=labels.cpu())
    return {name: round(value, 5) for name, value in metric.compute().items()}


def baselines(task: Task) -> dict[str, dict[str, float]]:
    """Scores on the test part without any network: always the commonest class, and a linear SVM on TF-IDF."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import LinearSVC

        from recipes.lib.metrics import Classification
    except ImportError as error:
        raise ValueError(f"{error}: pip install -e '.[recipes]'") from None

    def texts(examples: Sequence[Example]) -> list[str]:
        return [f"{example.text} {example.pair or ''}" for example in examples]

    def scores(predicted: Sequence[str]) -> dict[str, float]:
        numbers = [task.labels.index(label) for label in predicted]
        actual = [task.labels.index(example.label) for example in task.test]
        return Classification().compute(predictions=numbers, references=actual)

    commonest = Counter(example.label for example in task.train).most_common(1)[0][0]
    svm = make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LinearSVC(random_state=0))
    svm.fit(texts(task.train), [example.label for example in task.train])
    return {
        "the commonest class": scores([commonest] * len(task.test)),
        "TF-IDF and a linear SVM": scores(list(svm.predict(texts(task.test)))),
    }


if __name__ == "__main__":
    main()
