"""Protects what people read of sharpness: the comparison of two networks, its warnings, the command line, the log."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, Trainer, TrainingArguments

from hf_lamb import LambTrainer, LambTrainingArguments, ShardingError
from hf_lamb.sharpness import (
    SharpnessCallback,
    __main__,
    adaptive_sharpness,
    compare,
    cross_entropy,
    fixed_batches,
    labels_loss,
    plots,
)
from hf_lamb.sharpness.compare import Comparison, Measured, recorded_history
from hf_lamb.sharpness.objective import Scores
from tests.helpers import on_processes, one_line, says
from tests.test_sharpness import digits, trained, unchanged

# -- the comparison --------------------------------------------------------------------------------------------------


def compared(losses: tuple[float, float], sharpness: tuple[float, float], slope: float = 0.1) -> Comparison:
    """As if two networks had been measured."""
    sides = [
        Measured(
            name,
            Scores(loss, 0.5),
            None,
            {"adaptive sharpness": value, "adaptive sharpness, slope alone": slope},
            {},
            [],
        )
        for name, loss, value in zip(("small batch", "large batch"), losses, sharpness, strict=True)
    ]
    return Comparison(sides[0], sides[1], [], [], {"rho": 1e-2})


def test_the_verdict_says_sharper_at_equal_loss_only() -> None:
    assert "large batch is sharper, 2.00 times" in compared((1.0, 1.05), (1.0, 2.0)).verdict
    assert "small batch is sharper, 2.00 times" in compared((1.0, 1.05), (2.0, 1.0)).verdict
    assert "About equally sharp" in compared((1.0, 1.05), (1.0, 1.04)).verdict
    assert compared((1.0, 1.09), (1.0, 2.0)).warning is None
    unequal = compared((1.0, 1.2), (1.0, 2.0))
    assert unequal.warning is not None
    assert re.search("losses differ by 20%, small batch 1, large batch 1.2: .* ranking may reverse", unequal.warning)
    assert unequal.verdict.startswith("No verdict: 20% between the training losses")
    for comparison in (compared((1.0, 1.0), (1.0, 2.0)), unequal):
        assert "worse" not in comparison.table()
        assert "small batch 1, large batch 1" in comparison.verdict, "both losses stand beside the verdict"


def test_a_slope_is_no_curvature() -> None:
    """Where most of the sharpness is slope the table says so: it measures how far training is from having settled."""
    assert compared((1.0, 1.0), (1.0, 2.0), slope=0.5).note is None
    sloping = compared((1.0, 1.0), (1.0, 2.0), slope=0.9)
    assert "NOTE: the slope alone makes 90% and 45% of the adaptive sharpness" in sloping.table()


def test_networks_of_digits(tmp_path: Path) -> None:
    """Any module and loss: every metric on both, training and held-out scores, the line, a report on disk."""
    images, classes = digits(400)
    train, held_out = [(images[:300], classes[:300])], [(images[300:], classes[300:])]
    models = [trained(seed, 16, nn.ReLU, 300) for seed in (0, 1)]
    with unchanged(models[0]), unchanged(models[1]):
        comparison = compare(*models, cross_entropy, train, held_out, subspace=5, curvature=True, alphas=[0, 0.5, 1])
    for side, model in zip((comparison.small, comparison.large), models, strict=True):
        loss = cross_entropy(model, train[0]).loss.item()
        assert side.train.loss == pytest.approx(loss, rel=1e-5)
        assert side.metrics["adaptive sharpness"] == adaptive_sharpness(model, cross_entropy, train).value
        assert list(side.layers) == ["0", "2"]
        assert len(side.metrics) == 10
        assert all(value > 0 for value in side.metrics.values())
    assert comparison.path[0].loss == pytest.approx(comparison.small.train.loss)
    assert comparison.held_out_path[2].loss == pytest.approx(comparison.large.held_out.loss)

    written = comparison.save(tmp_path / "report")
    assert {path.name for path in written} == {path.name for path in (tmp_path / "report").iterdir()}
    assert sum(path.read_bytes().startswith(b"\x89PNG") for path in written) == 3
    record = json.loads((tmp_path / "report/report.json").read_text())
    assert record["small"]["train"]["loss"] == comparison.small.train.loss
    assert len(record["path"]) == 3
    assert (tmp_path / "report/report.txt").read_text() == comparison.table() + "\n"


def test_infinite_distances_are_null_in_json() -> None:
    """A network that nothing can change has no distance to a higher loss."""

    class Constant(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0

    model = Constant(64, 10)
    comparison = compare(model, model, cross_entropy, [digits(20)], alphas=[0.0])
    record = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert record["small"]["metrics"]["flatness, worst direction"] is None
    assert "About equally sharp" in comparison.table()


def test_nothing_is_written_when_a_picture_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half of a file, under its own name or another."""

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(plots, "plot_path", full)
    model = trained(0, 8, nn.ReLU, 5)
    comparison = compare(model, model, cross_entropy, [digits(20)], layers=False, alphas=[0.0, 1.0])
    with pytest.raises(OSError, match="disk full"):
        comparison.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.txt"}


# -- the command line ------------------------------------------------------------------------------------------------

SMALL = ["--rows", "16", "--batch_size", "8", "--max_length", "24", "--steps", "3"]


def test_two_checkpoints_from_the_command_line(
    finished: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of Trainer and what save_model wrote, on text, with the first one's tokenizer and fixed masks."""
    train, held_out = sorted(map(str, texts.glob("*.txt")))[:2]
    arguments = [str(finished / "checkpoint-4"), str(finished), "--data", train, "--held_out", held_out, *SMALL]
    outputs = []
    for options in (["--no_layers"], []):
        __main__.main([*arguments, *options, "--output_dir", str(tmp_path / "report"), "--device", "cpu"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0].partition("report.json")[0] == outputs[1].partition("report.json")[0], "masks that stay"
    assert re.search(r"training loss \(nats\) +[56]\.\d+ +[56]\.\d+ ", outputs[0])
    assert re.search(r"held-out accuracy +0", outputs[0])
    assert re.search(r"sharp(er|), .*at training losses small batch \d\.\d+, large batch \d\.\d+\.", outputs[0])
    assert "worse" not in outputs[0]
    record = json.loads((tmp_path / "report/report.json").read_text())
    assert "bert.encoder.layer.0.attention.self.value" in record["small"]["layers"]
    assert {path.suffix for path in (tmp_path / "report").iterdir()} == {".json", ".txt", ".png"}


def test_sequence_classification_and_saved_batches(finished: Path, tmp_path: Path) -> None:
    """.jsonl with labels, by name too; .pt as it is."""
    config = BertConfig.from_pretrained(finished, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    config.architectures = None
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "classifier" / name).write_bytes((finished / name).read_bytes())
    lines = [{"text": f"the people {i}", "label": ("no", "yes")[i % 2]} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = [str(tmp_path / "classifier")] * 2
    output = ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--no_layers", *SMALL]
    __main__.main([*both, "--data", str(tmp_path / "rows.jsonl"), *output])
    record = json.loads((tmp_path / "out/report.json").read_text())
    assert record["small"]["train"]["loss"] == pytest.approx(0.69, abs=0.1)
    assert "About equally sharp" in record["verdict"]

    torch.save([{"input_ids": torch.tensor([[2, 9, 3]]), "labels": torch.tensor([1])}], tmp_path / "batches.pt")
    __main__.main([*both, "--data", str(tmp_path / "batches.pt"), *output])
    assert json.loads((tmp_path / "out/report.json").read_text())["settings"]["batches"] == 1


def test_bad_command_lines_end_in_one_line(finished: Path, texts: Path, tmp_path: Path) -> None:
    """With the thing that is wrong and the remedy, and without a report."""
    text = str(next(texts.glob("*.txt")))
    (tmp_path / "bad.jsonl").write_text("no json\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.pt").write_bytes(b"no tensors")
    other = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(other).save_pretrained(tmp_path / "other")
    (tmp_path / "config_only").mkdir()
    (tmp_path / "config_only/config.json").write_bytes((finished / "config.json").read_bytes())
    run, output = str(finished), tmp_path / "out"

    def refused(message: str, *arguments: str) -> None:
        with pytest.raises(SystemExit) as caught:
            __main__.main([*arguments, *SMALL, "--output_dir", str(output), "--device", "cpu"])
        line = str(caught.value)
        assert line.startswith("hf_lamb.sharpness: ")
        says(line, message)

    refused("nowhere cannot be loaded .*give a folder", run, str(tmp_path / "nowhere"), "--data", text)
    refused("config_only cannot be loaded", str(tmp_path / "config_only"), run, "--data", text)
    refused("same architecture: .* has shape", run, str(tmp_path / "other"), "--data", text, "--no_layers")
    refused("other has no tokenizer .*or give --data as .pt", str(tmp_path / "other"), run, "--data", text)
    refused("cannot read missing.txt .*check the file", run, run, "--data", "missing.txt")
    refused("cannot read data.csv: give a .txt, .jsonl or .pt file", run, run, "--data", "data.csv")
    refused('bad.jsonl:1 is no JSON with a "text"', run, run, "--data", str(tmp_path / "bad.jsonl"))
    refused("empty.txt holds no text", run, run, "--data", str(tmp_path / "empty.txt"))
    refused("cannot read .*bad.pt .*torch.save", run, run, "--data", str(tmp_path / "bad.pt"))
    refused("rho=-1.0: expected a positive number", run, run, "--data", text, "--rho", "-1")
    assert not output.exists()


def test_checkpoints_of_two_tokenizers_are_refused(finished: Path, tmp_path: Path) -> None:
    """Of equally many tokens, too: the second would be measured on batches that mean nothing to it."""
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["the"], vocabulary["of"] = vocabulary["of"], vocabulary["the"]
    file.write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text("the people of the states\n" * 50)
    arguments = [str(finished), str(other), "--data", str(tmp_path / "text.txt"), "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"have different tokenizers, .*: compare checkpoints that were trained with"):
        __main__.main([*arguments, "--output_dir", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("device", ["no such device", *(["cuda"] if not torch.cuda.is_available() else [])])
def test_a_device_that_is_not_there_is_named(device: str, finished: Path) -> None:
    with one_line(SystemExit, f"--device {device} cannot be used .*: give cpu, or one that is there"):
        __main__.main([str(finished), str(finished), "--data", "unread.txt", "--device", device])


def test_a_checkpoint_without_its_head_is_refused(finished: Path, tmp_path: Path) -> None:
    """transformers would fill it with random weights, and sharpness would be that of noise."""
    model = BertForMaskedLM.from_pretrained(finished)
    model.bert.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    with pytest.raises(SystemExit, match=r"lacks weights of BertForMaskedLM .*give a checkpoint of the whole"):
        __main__.main([str(tmp_path), str(finished), "--data", "unread.txt", "--device", "cpu"])


# -- while training --------------------------------------------------------------------------------------------------


class Rows(Dataset):
    """Random token ids with a label each; a little is there to be learnt."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 50, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids[0] % 2}


def train(output: Path, callbacks: list[Any], trainer: type[Trainer] = LambTrainer, **options: Any) -> Trainer:
    """Twelve steps of a BERT with dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    defaults = {"max_steps": 12, "learning_rate": 1e-2, "logging_steps": 5, "save_strategy": "no", "report_to": []}
    defaults |= {"per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
    kind = LambTrainingArguments if trainer is LambTrainer else TrainingArguments
    args = kind(output_dir=str(output), **defaults | options)
    made = trainer(model=BertForSequenceClassification(config), args=args, train_dataset=Rows(), callbacks=callbacks)
    made.train()
    return made


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_run_with_the_callback_is_the_run_without(tmp_path: Path, options: dict[str, Any]) -> None:
    """Weights bit for bit, dropout and data order included."""
    batches = fixed_batches(Rows(), 8, 2)
    alone = train(tmp_path, [], **options).model.state_dict()
    watched = train(tmp_path, [SharpnessCallback(batches, 4, steps=2)], **options).model.state_dict()
    assert all(torch.equal(watched[name], weight) for name, weight in alone.items())


@pytest.mark.parametrize("trainer", [LambTrainer, Trainer])
def test_what_the_callback_logs(tmp_path: Path, trainer: type[Trainer]) -> None:
    """Every `interval` steps and at the end: what adaptive_sharpness gives for the weights of that step."""
    batches = fixed_batches(Rows(), 8, 3)
    made = train(tmp_path, [SharpnessCallback(batches, 5, steps=4)], trainer)
    lines = [line for line in made.state.log_history if "sharpness/adaptive" in line]
    assert [line["step"] for line in lines] == [5, 10, 12]
    found = adaptive_sharpness(made.model, labels_loss, batches, steps=4)
    assert lines[-1]["sharpness/adaptive"] == found.value
    assert lines[-1]["sharpness/loss"] == found.loss
    assert lines[-1]["sharpness/epsilon"] > 0

    made.save_state()
    assert recorded_history(tmp_path) == [(line["sharpness/loss"], line["sharpness/adaptive"]) for line in lines]


def test_the_callback_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    """Before the training, not at the first measurement."""
    with pytest.raises(ValueError, match="no batches; pass a list"):
        SharpnessCallback([], 5)
    with pytest.raises(ValueError, match="interval=0: expected a whole number of steps"):
        SharpnessCallback(fixed_batches(Rows(), 8, 1), 0)
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks what it has partitioned
    with pytest.raises(ShardingError, match=r"or train with DDP: parameter weight is partitioned by DeepSpeed ZeRO-3"):
        SharpnessCallback(fixed_batches(Rows(), 8, 1), 5).on_train_begin(None, None, None, model=model)


@pytest.mark.distributed
def test_on_two_processes(tmp_path: Path) -> None:
    """DDP with half the batches each gives the values of one process with all; FSDP2 is refused by name."""
    on_processes(2, "tests.scripts.sharpness_ddp", str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "the processes report different values"
    for name, (shared, alone) in first["metrics"].items():
        assert shared == pytest.approx(alone, rel=1e-4), name
    assert first["unchanged"]
    assert re.search(r"parameter weight is a DTensor with placements \(Shard\(dim=0\),\)", first["refused"])
    assert first["callback"] == pytest.approx(first["callback_alone"], rel=1e-4)
