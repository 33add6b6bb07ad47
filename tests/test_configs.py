"""Protects the ready configurations: they parse, are the published plans, fit their GPUs, and build their models."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from hf_lamb.batch_schedule import batch_stages
from hf_lamb.plan import PLANS
from recipes import pretrain_bert
from recipes.lib.bert import new_bert
from recipes.pretrain_bert import LambTrainingArguments, PhaseRun
from tests.helpers import pretrain

CONFIGS = Path(__file__).parent.parent / "recipes/configs"

# The plan that each is, and its parameters: transformers' BertForMaskedLM of the published sizes and vocabularies.
EXPECTED = {
    "bert_large_64k_32k": ("nvidia-bert-large", 335_174_458),
    "bert_base_32k": ("paper-32k", 109_514_298 - 384 * 768),  # 128 positions
    "gpt_bert_32k": ("gpt-bert", 109_514_298 - (30_522 - 16_384) * 769),
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
        expected.pop("vocab_size", None)  # the model's size is tested below
        for option, value in expected.items():
            assert getattr(recipe if hasattr(recipe, option) else args, option) == value, option
        assert warmup == phase.options["warmup_steps"]
        split = (args.per_device_train_batch_size, args.gradient_accumulation_steps, gpus)
        if args.batch_size_schedule is None:
            assert split[0] * split[1] * split[2] == phase.options["global_batch_size"]
        else:
            assert split[1] == 1
            assert phase.stages(split[0] * gpus).at(0).accumulation >= 1
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
    assert model.config.max_position_embeddings == (512 if "large" in name or "gpt" in name else 128)
    assert model.config.hidden_dropout_prob == 0.1


@pytest.mark.slow
def test_a_toy_of_the_run_of_gpt_bert_from_end_to_end(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file itself, with steps, batches, lengths and model made small: batches, rates and lengths of its phases."""
    content = yaml.safe_load((CONFIGS / "gpt_bert_32k.yaml").read_text())
    content |= {"size": "smoke", "vocab_size": 400, "save_steps": 100, "dataloader_num_workers": 0}
    for phase in content["phases"]:
        first, last, steps = (int(number) for number in re.findall(r"\d+", phase["batch_size_schedule"]))
        steps = max(4, steps // 500)
        phase["batch_size_schedule"] = f"{first // 512}->{last // 512} over {steps}"
        phase |= {"max_steps": steps, "warmup_steps": phase["warmup_steps"] // 125, "per_device_train_batch_size": 4}
        phase["max_seq_length"] //= 4
        if "num_decay_steps" in phase["lr_scheduler_kwargs"]:
            phase["lr_scheduler_kwargs"] |= {"num_stable_steps": steps - 2, "num_decay_steps": 2}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content))
    more = ["--use_cpu", "True", "--disable_tqdm", "True", "--eval_strategy", "no", "--logging_steps", "1"]
    pretrain(
        monkeypatch,
        *("--plan", f"{tmp_path}/toy.yaml", "--corpus", str(texts), "--output_dir", f"{tmp_path}/out", *more),
    )
    rates = []
    for number, phase in enumerate(content["phases"], 1):
        folder = tmp_path / f"out/phase-{number}"
        state = json.loads((folder / f"checkpoint-{phase['max_steps']}/trainer_state.json").read_text())
        lines = [line for line in state["log_history"] if "loss" in line]
        stages = batch_stages(phase["batch_size_schedule"], 4)
        assert [line["lamb/batch_size"] for line in lines] == [stages.at(s).batch_size for s in range(len(lines))]
        assert len({line["lamb/batch_size"] for line in lines}) > 1 or number == 3
        (record,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        assert record["options"]["betas"] == [0.9, 0.98]
        assert record["options"]["eps"] == 1e-8
        assert record["carry_over"] == ("optimizer" if number > 1 else None)
        rates.append([line["learning_rate"] for line in lines])
    assert rates[1][0] == pytest.approx(0.002911)
    assert rates[0][-1] > rates[1][0] > rates[1][-1] > rates[2][-1] > 0


@pytest.mark.parametrize(("name", "machines", "gpus"), [("ddp", 1, 8), ("fsdp2", 1, 8), ("ddp_8x8", 8, 64)])
def test_the_configurations_of_accelerate_are_for_these_gpus(name: str, machines: int, gpus: int) -> None:
    config = load_config_from_file(str(CONFIGS / f"accelerate/{name}.yaml"))
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (machines, gpus, "bf16")
