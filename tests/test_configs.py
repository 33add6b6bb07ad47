"""Protects the ready configurations: they parse, are the published plans, fit their GPUs, and build their models."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from hf_lamb.plan import PLANS
from recipes import pretrain_bert
from recipes.lib.bert import new_bert
from recipes.pretrain_bert import LambTrainingArguments, PhaseRun

CONFIGS = Path(__file__).parent.parent / "recipes/configs"

# The plan that each is, and its parameters: transformers' BertForMaskedLM of the published sizes and vocabularies.
EXPECTED = {
    "bert_large_64k_32k": ("nvidia-bert-large", 335_174_458),
    "bert_base_32k": ("paper-32k", 109_514_298 - 384 * 768),  # 128 positions
    "ltg_babylm_32k": ("ltg-bert", 109_514_298 - 384 * 768 - (30_522 - 16_384) * 769),
}


class Vocabulary:
    """As much of a tokenizer as `new_bert` looks at."""

    pad_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def phases_on(gpus: int, name: str, monkeypatch: pytest.MonkeyPatch) -> list[PhaseRun]:
    monkeypatch.setattr(LambTrainingArguments, "world_size", property(lambda _: gpus))
    monkeypatch.setattr(pretrain_bert, "check_connected", lambda _: None)
    return pretrain_bert.parse_phases(["--plan", str(CONFIGS / f"{name}.yaml"), "--use_cpu"])


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("gpus", [8, 16, 32, 64])
@pytest.mark.parametrize("name", EXPECTED)
def test_steps_rate_warmup_and_accumulation(name: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the published plan on any of these numbers of GPUs; `pytest -s` shows them."""
    plan = PLANS[EXPECTED[name][0]]
    got = phases_on(gpus, name, monkeypatch)
    assert len(got) == len(plan.phases)
    for (recipe, args), phase in zip([(p.recipe, p.args) for p in got], plan.phases, strict=True):
        warmup = args.get_warmup_steps(args.max_steps)
        expected = {"decay_power": 1, "decay_from_first_step": False} | plan.options_of(phase)
        del expected["size"]  # the paper's row, for BERT-base
        if "lr_scheduler_type" in expected:
            expected["decay_power"] = None
        for option, value in expected.items():
            assert getattr(recipe if hasattr(recipe, option) else args, option) == value, option
        assert warmup == phase.options["warmup_steps"]
        split = (args.per_device_train_batch_size, args.gradient_accumulation_steps, gpus)
        assert split[0] * split[1] * split[2] == phase.options["global_batch_size"]
        print(  # noqa: T201
            f"{name}, {gpus} GPUs: {args.max_steps:,} steps of {recipe.global_batch_size:,} = {split[0]} x {split[1]} "
            f"accumulation x {gpus}, {recipe.max_seq_length} tokens, rate {args.learning_rate:g}, warm-up {warmup:,}"
        )


@pytest.mark.parametrize("name", EXPECTED)
def test_the_model_has_the_published_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which holds shapes only."""
    phase = phases_on(8, name, monkeypatch)[0]
    with torch.device("meta"):
        model = new_bert(phase.recipe.size, Vocabulary(phase.recipe.vocab_size), phase.longest_sequence)
    assert model.num_parameters() == EXPECTED[name][1]
    assert model.config.max_position_embeddings == (512 if "large" in name else 128)
    assert model.config.hidden_dropout_prob == 0.1


@pytest.mark.parametrize(("name", "machines", "gpus"), [("ddp", 1, 8), ("fsdp2", 1, 8), ("ddp_8x8", 8, 64)])
def test_the_configurations_of_accelerate_are_for_these_gpus(name: str, machines: int, gpus: int) -> None:
    config = load_config_from_file(str(CONFIGS / f"accelerate/{name}.yaml"))
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (machines, gpus, "bf16")
