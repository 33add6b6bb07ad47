"""Protects what `LambTrainingArguments` ask for, whether that is what trains, and what the records say of it."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertForMaskedLM, HfArgumentParser, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_utils import HPSearchBackend

from hf_lamb import Lamb, LambTrainer, LambTrainingArguments, options_in_force
from hf_lamb.trainer import deepspeed
from tests.scripts import split_batch

SCALED = {"base_learning_rate": 8e-3, "base_batch_size": 64}  # 2e-3 at the batch of 4 below
WITH_END = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}}


def arguments(path: Path, cls: type[TrainingArguments] = LambTrainingArguments, **options: Any) -> Any:
    defaults: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "save_steps": 2}
    return cls(output_dir=str(path), use_cpu=True, report_to=[], disable_tqdm=True, **defaults | options)


def model() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = {"vocab_size": split_batch.VOCAB, "max_position_embeddings": split_batch.LENGTH, "hidden_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(**config))


def trainer(path: Path, args: Any = None, optimizers: Any = (None, None), **options: Any) -> LambTrainer:
    return LambTrainer(
        model=model(),
        args=args or arguments(path, **options),
        train_dataset=split_batch.FixedRows("mlm", 64, seed=0),
        eval_dataset=split_batch.FixedRows("mlm", 8, seed=1),
        optimizers=optimizers,
    )


def rates(run: LambTrainer) -> list[float]:
    return [line["learning_rate"] for line in run.state.log_history if "loss" in line]


# -- arguments are what they were -------------------------------------------------------------------------------------


def from_json(args: LambTrainingArguments, path: Path) -> LambTrainingArguments:
    (path / "args.json").write_text(args.to_json_string())
    return HfArgumentParser(LambTrainingArguments).parse_json_file(path / "args.json", allow_extra_keys=True)[0]


def from_yaml(args: LambTrainingArguments, path: Path) -> LambTrainingArguments:
    (path / "args.yaml").write_text(yaml.safe_dump(json.loads(args.to_json_string())))
    return HfArgumentParser(LambTrainingArguments).parse_yaml_file(path / "args.yaml", allow_extra_keys=True)[0]


def replaced(args: LambTrainingArguments, path: Path) -> LambTrainingArguments:
    return dataclasses.replace(args, logging_steps=2)


@pytest.mark.parametrize("copy", [from_json, from_yaml, replaced])
@pytest.mark.parametrize("options", [{}, SCALED, {"learning_rate": 2e-3}, SCALED | {"decay_power": 0.5}])
def test_used_arguments_can_be_copied_and_read_back(copy: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """A run writes nothing into them: its rate would contradict base_learning_rate."""
    args = arguments(tmp_path, save_strategy="no", **options)
    before = args.to_dict()
    first = trainer(tmp_path, args)
    first.train()
    assert args.to_dict() == before
    second = trainer(tmp_path, copy(args, tmp_path))
    second.create_optimizer()
    assert options_in_force(second.optimizer)["learning_rate"] == options_in_force(first.optimizer)["learning_rate"]


def test_used_arguments_serve_another_batch(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="no", **SCALED)
    trainer(tmp_path, args).train()
    args.per_device_train_batch_size = 16
    run = trainer(tmp_path, args)
    run.train()
    assert rates(run)[0] == pytest.approx(4e-3)


def test_reports_do_not_name_a_rate_that_does_not_count(tmp_path: Path) -> None:
    """TensorBoard and W&B log `to_dict()`."""
    assert "learning_rate" not in arguments(tmp_path, **SCALED).to_dict()
    assert arguments(tmp_path).to_dict()["learning_rate"] == 1e-3


# -- of two rates the one that is set last holds ----------------------------------------------------------------------

SUGGESTED: list[tuple[dict[str, Any], dict[str, Any], float]] = [
    (SCALED, {"learning_rate": 3e-3}, 3e-3),
    (SCALED, {"learning_rate": 1e-3}, 1e-3),  # which is also the default
    (SCALED, {"base_learning_rate": 4e-3}, 1e-3),
    (SCALED, {"base_learning_rate": 4e-3, "per_device_train_batch_size": 16}, 2e-3),
    ({}, {"learning_rate": 3e-3}, 3e-3),
    (SCALED, {"learning_rate_scaling": "linear"}, 5e-4),
]


@pytest.mark.parametrize(("options", "suggested", "rate"), SUGGESTED)
def test_a_searchs_suggestion_is_what_trains(
    options: dict[str, Any], suggested: dict[str, Any], rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, save_strategy="no", **options)
    run.hp_search_backend = HPSearchBackend.WANDB  # whose trials are dicts
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    monkeypatch.setattr(run, "_get_output_dir", lambda trial: str(tmp_path))
    run.train(trial=suggested)
    assert rates(run)[0] == pytest.approx(rate, rel=1e-12)
    assert options_in_force(run.optimizer)["learning_rate"] == pytest.approx(rate, rel=1e-12)


def test_a_search_goes_to_and_fro_between_the_rates(tmp_path: Path) -> None:
    args = arguments(tmp_path, **SCALED)
    args.learning_rate = 3e-3
    assert (args.base_learning_rate, args.base_batch_size) == (None, None)
    assert dataclasses.replace(args).learning_rate == 3e-3
    args.base_learning_rate = 8e-3
    assert (args.base_batch_size, args.learning_rate) == (64, 1e-3)
    assert dataclasses.replace(args).base_learning_rate == 8e-3


def test_what_a_search_makes_contradictory_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, decay_power=0.5)
    args.lr_scheduler_type = "cosine"
    with pytest.raises(ValueError, match=r"decay_power 0\.5 and lr_scheduler_type cosine contradict each other"):
        trainer(tmp_path, args).train()


# -- epsilon ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "eps"),
    [
        ({}, 1e-6),
        ({"adam_epsilon": 1e-8}, 1e-8),
        ({"adam_epsilon": 1e-7}, 1e-7),
        ({"optim_args": "eps=1e-8"}, 1e-8),
        ({"adam_epsilon": 1e-7, "optim_args": "eps=1e-5"}, 1e-5),
        ({"optim": "adamw_torch"}, 1e-8),
        ({"optim": "adamw_torch", "adam_epsilon": 1e-6}, 1e-6),
    ],
)
def test_epsilon_is_the_optimizers_unless_somebody_chose_one(
    options: dict[str, Any], eps: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing is said of it: LambTrainingArguments know a default from a choice. Also read back from JSON."""
    args = arguments(tmp_path, **options)
    for given in (args, from_json(args, tmp_path)):
        run = trainer(tmp_path, given)
        assert options_in_force(run.create_optimizer())["eps"] == eps
    assert not [message for message in caplog.messages if "eps" in message]


# -- which optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "passed", "warns"),
    [
        (TrainingArguments, {}, False, True),
        (TrainingArguments, {"optim": "lamb"}, False, False),
        (TrainingArguments, {"optim": "sgd"}, False, False),
        (TrainingArguments, {}, True, False),
        (LambTrainingArguments, {}, False, False),
        (LambTrainingArguments, {"optim": "adamw_torch"}, False, False),
        (LambTrainingArguments, {"optim": "adamw_torch_fused"}, False, False),
    ],
)
def test_adamw_by_default_is_said(
    cls: type[TrainingArguments],
    options: dict[str, Any],
    passed: bool,
    warns: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With plain TrainingArguments, whose default it is: one who takes LambTrainer expects LAMB."""
    run = trainer(tmp_path, arguments(tmp_path, cls, **options))
    if passed:
        run = trainer(tmp_path, run.args, optimizers=(Lamb(run.model.parameters()), None))
    run.create_optimizer()
    lines = [message for message in caplog.messages if "for LAMB use LambTrainingArguments" in message]
    assert len(lines) == warns
    assert all("adamw_torch" in line for line in lines)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, {}, r"remove .optimizer. .*: its AdamW would replace optim=\"lamb\""),
        ({"scheduler": {"type": "WarmupLR"}}, SCALED, r"remove .scheduler. .*: it would override base_learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, {"decay_power": 0.5}, "it would override decay_power"),
        ({"optimizer": {"type": "AdamW"}}, {"optim": "adamw_torch"}, None),
        ({"scheduler": {"type": "WarmupLR"}}, {}, None),
    ],
)
def test_deepspeeds_optimizer_and_scheduler_do_not_replace_ours_silently(
    config: dict[str, Any], options: dict[str, Any], message: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(deepspeed, "configuration_of", lambda trainer: config)
    if message is None:
        trainer(tmp_path, **options)
    else:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **options)


# -- what a resumed run trains with, and says -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with the rate 1e-2 that falls to 1e-3, saved at step 2."""
    path = tmp_path_factory.mktemp("first")
    trainer(path, learning_rate=1e-2, **WITH_END).train()
    return path


OTHERS: list[tuple[dict[str, Any], list[str]]] = [
    ({"learning_rate": 2e-3}, ["learning_rate 0.01, not 0.002"]),
    ({"weight_decay": 0.1}, ["weight_decay 0.01, not 0.1"]),
    (
        {"optim_args": "max_trust_ratio=10,eps=1e-3,beta2=0.9"},
        ["betas (0.9, 0.999), not (0.9, 0.9)", "eps 1e-06, not 0.001", "max_trust_ratio None, not 10.0"],
    ),
    ({"optim_args": "adapt_all=true"}, ["layer_adaptation False, not True"]),
    ({"base_learning_rate": 8e-3, "base_batch_size": 64}, ["learning_rate 0.01, not 0.002"]),
]


@pytest.mark.parametrize(("options", "said"), OTHERS)
def test_a_resumed_run_says_which_options_it_goes_on_with(
    options: dict[str, Any], said: list[str], first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line with both values; the run is the uninterrupted one to its schedule's end, and the card says so."""
    whole = json.loads((first / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    if "base_learning_rate" not in options:
        options = {"learning_rate": 1e-2} | options
    run = trainer(tmp_path, **WITH_END, **options)
    run.train(resume_from_checkpoint=str(first / "checkpoint-2"))
    (line,) = [message for message in caplog.messages if "uses the options" in message]
    assert line.startswith(f"a resumed run uses the options of its checkpoint: {'; '.join(said)}. To train")
    assert "trainer.start_from(checkpoint, 'optimizer')" in line
    assert rates(run) == pytest.approx([entry["learning_rate"] for entry in whole if "loss" in entry], rel=1e-12)
    in_force = options_in_force(run.optimizer)
    expected = {"learning_rate": 1e-2, "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-6}
    assert in_force | expected == in_force
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    for words in ("- learning_rate: 0.01\n", "- learning rate 0.01\n", "- weight decay: 0.01,"):
        assert words in card
    assert card.count("betas=(0.9, 0.999), eps=1e-06, bias_correction=True\n") == 2


def test_the_same_options_again_are_not_worth_a_line(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, learning_rate=1e-2, **WITH_END).train(resume_from_checkpoint=str(first / "checkpoint-2"))
    another = trainer(tmp_path, learning_rate=2e-3, weight_decay=0.1)
    another.start_from(str(first / "checkpoint-2"), "optimizer")  # the way to other options
    another.train()
    assert options_in_force(another.optimizer)["weight_decay"] == 0.1
    assert not [message for message in caplog.messages if "uses the options" in message]


def test_a_passed_optimizer_keeps_its_rate_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, optimizers=(Lamb(model().parameters(), lr=5e-3), None), **SCALED)
    with caplog.at_level(logging.WARNING, logger="hf_lamb"):
        run.train()
    (line,) = [message for message in caplog.messages if "base_learning_rate or" in message]
    assert "the run uses the optimizer's peak learning rate 0.005, not 0.002 of base_learning_rate" in line


def test_options_in_force_are_any_optimizers() -> None:
    """The largest rate and decay of the groups, at the schedule's peak."""
    groups = [{"params": [torch.ones(2)], "weight_decay": 0.0, "lr": 0.1}, {"params": [torch.ones(2)]}]
    sgd = torch.optim.SGD(groups, lr=0.4, weight_decay=0.02, momentum=0.9)
    torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.5)
    options = options_in_force(sgd)
    assert (options["learning_rate"], options["weight_decay"], options["momentum"]) == (0.4, 0.02, 0.9)
    assert options_in_force(Lamb([torch.ones(2)], lr=torch.tensor(0.25)))["learning_rate"] == 0.25


# -- the model card ---------------------------------------------------------------------------------------------------


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="no")
    run.train()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "OptimizerNames" not in card
    assert "Use lamb and the args are:\nbetas=(0.9, 0.999), eps=1e-06" in card
    assert "unknown dataset" not in card
    assert "on 64 rows." in card
    assert "## Model description\n\nBertForMaskedLM with " in card
    assert "## Training and evaluation data\n\nTrained on 64 rows, evaluated on 8 rows.\n" in card
    run.dataset_name, run.card_sections = "embedded corpus", {"Intended uses & limitations": "To try LAMB."}
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "on the embedded corpus dataset." in card
    assert "Trained on embedded corpus, 64 rows, evaluated on 8 rows." in card
    assert "## Intended uses & limitations\n\nTo try LAMB.\n" in card
    assert "More information needed" not in card
