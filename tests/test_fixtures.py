"""Protects what people have on their disks: files that version 0.1.0 wrote load, and mean the same."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from hf_lamb import Lamb, LambTrainingArguments
from tests.scripts.checkpointed_run import STEPS, trainer
from tests.scripts.write_fixtures import stepped

FIXTURES = Path(__file__).parent / "fixtures/0.1.0"


def assert_same_state(ours: Lamb, other: Lamb) -> None:
    for group, expected in zip(ours.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in expected.items() if k != "params"
        }
        for param, wanted in zip(group["params"], expected["params"], strict=True):
            torch.testing.assert_close(param, wanted, rtol=1e-6, atol=1e-7)  # by another kernel
            assert ours.state[param].keys() == other.state[wanted].keys() == {"step", "exp_avg", "exp_avg_sq"}
            for name, value in other.state[wanted].items():
                torch.testing.assert_close(ours.state[param][name], value, rtol=1e-6, atol=1e-9)


def take_a_step(optimizer: Lamb) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, 0.5)
    optimizer.step()


def test_a_pickled_optimizer_goes_on() -> None:
    optimizer, expected = pickle.loads((FIXTURES / "lamb.pickle").read_bytes()), stepped()
    assert_same_state(optimizer, expected)
    take_a_step(optimizer)
    take_a_step(expected)
    assert_same_state(optimizer, expected)


def test_a_state_dict_loads() -> None:
    expected = stepped()
    optimizer = pickle.loads(pickle.dumps(expected))
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    optimizer.load_state_dict(torch.load(FIXTURES / "state_dict.pt", weights_only=True))
    assert_same_state(optimizer, expected)


def test_training_arguments_load() -> None:
    args = torch.load(FIXTURES / "checkpoint-2/training_args.bin", weights_only=False)
    assert type(args) is LambTrainingArguments
    assert (args.optim, args.learning_rate, args.gradient_accumulation_steps) == ("lamb", 1e-3, 2)


def test_a_checkpoint_is_resumed(tmp_path: Path) -> None:
    """And ends with the weights of an uninterrupted run."""
    whole = trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    shutil.copytree(FIXTURES / "checkpoint-2", tmp_path / "resumed/checkpoint-2")
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    for ours, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lamb_state.json", "trainer_state.json"])
def test_the_checkpoint_holds_what_later_versions_read(name: str) -> None:
    assert (FIXTURES / "checkpoint-2" / name).is_file()
