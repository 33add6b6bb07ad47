"""Protects runs in several phases: what the next phase takes over, what it begins anew, and where it goes on."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_lamb import CheckpointError, LambTrainer, LambTrainingArguments
from recipes import pretrain_bert
from tests.helpers import pretrain, torchrun
from tests.scripts import split_batch

PLAN = """
size: smoke
phases:
- {max_seq_length: 16, global_batch_size: 16, max_steps: 6, warmup_steps: 2, learning_rate: 0.02}
- {max_seq_length: 32, global_batch_size: 8, max_steps: 4, warmup_steps: 2, learning_rate: 0.01}
"""


# -- LambTrainer.start_from -------------------------------------------------------------------------------------------


def trainer(path: Path, **options: Any) -> LambTrainer:
    defaults = {"max_steps": 4, "save_steps": 4, "logging_steps": 1, "report_to": [], "use_cpu": True}
    args = LambTrainingArguments(output_dir=str(path), disable_tqdm=True, **defaults | options)
    model = split_batch.trained_model("mlm", path.parent / "start")
    data = split_batch.FixedRows("mlm", 64, seed=0)
    return LambTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> LambTrainer:
    """A run of four steps, saved at its end."""
    run = trainer(tmp_path_factory.mktemp("first") / "out", learning_rate=5e-3, weight_decay=0.01)
    run.train()
    return run


def checkpoint_of(run: LambTrainer) -> str:
    return f"{run.args.output_dir}/checkpoint-4"


class Begun(Exception):
    pass


class StopAtTheBeginning(TrainerCallback):
    """Before the first step, when everything is prepared and loaded."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise Begun


@pytest.mark.parametrize("carry_over", ["moments", "optimizer", "weights"])
def test_what_the_next_phase_takes_over(carry_over: str, first: LambTrainer, tmp_path: Path) -> None:
    """Weights always; moments and step count as asked; rate, decay and schedule never."""
    second = trainer(tmp_path / "out", learning_rate=2e-3, weight_decay=0.1, warmup_steps=2)
    second.start_from(checkpoint_of(first), carry_over)
    second.add_callback(StopAtTheBeginning())
    with pytest.raises(Begun):
        second.train()
    assert [group["lr"] for group in second.optimizer.param_groups] == [0.0, 0.0]  # warm-up, step 0
    assert [group["initial_lr"] for group in second.optimizer.param_groups] == [2e-3, 2e-3]
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.1, 0.0]
    assert second.lr_scheduler.last_epoch == 0
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        before, after = first.optimizer.state[a], second.optimizer.state.get(b, {})
        if carry_over == "weights":
            assert not after
            continue
        assert torch.equal(before["exp_avg"], after["exp_avg"])
        assert torch.equal(before["exp_avg_sq"], after["exp_avg_sq"])
        assert float(after["step"]) == (4 if carry_over == "optimizer" else 0)


def test_the_phase_before_may_have_another_kind_of_schedule(tmp_path: Path) -> None:
    """Its schedule is not used, so that its state need not fit."""
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    before = trainer(tmp_path / "before", **options)
    before.train()
    second = trainer(tmp_path / "out", learning_rate=2e-3)
    second.start_from(checkpoint_of(before))
    second.train()
    rates = [line["learning_rate"] for line in second.state.log_history if "loss" in line]
    assert rates == pytest.approx([2e-3, 1.5e-3, 1e-3, 5e-4])


def test_a_phase_logs_its_own_steps_and_rates(first: LambTrainer, tmp_path: Path) -> None:
    second = trainer(tmp_path / "out", learning_rate=2e-3, warmup_steps=2)
    second.start_from(checkpoint_of(first))
    second.train()
    lines = [line for line in second.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 1e-3, 2e-3, 1e-3])


def test_a_phase_that_resumes_takes_its_own_checkpoint(first: LambTrainer, tmp_path: Path) -> None:
    """Not that of the phase before: the same weights as the run that was not interrupted."""
    whole = trainer(tmp_path / "out", save_steps=2)
    whole.start_from(checkpoint_of(first))
    whole.train()
    resumed = trainer(tmp_path / "out", save_steps=2)
    resumed.start_from(checkpoint_of(first))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_what_a_phase_cannot_begin_with(first: LambTrainer, tmp_path: Path) -> None:
    second = trainer(tmp_path / "out")
    with pytest.raises(ValueError, match=r"carry_over 'moment' \(did you mean moments\?\): expected one of"):
        second.start_from(checkpoint_of(first), "moment")
    with pytest.raises(CheckpointError, match="nowhere is no checkpoint: it has no trainer_state"):
        second.start_from("nowhere")
    other = trainer(tmp_path / "out", optim="adamw_torch")
    other.start_from(checkpoint_of(first))
    with pytest.raises(CheckpointError, match="does not fit this run: resume with LAMB"):
        other.train()


# -- the recipe's --plan ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.yaml"
    file.write_text(PLAN)
    return file


def arguments(plan: Path, texts: Path, output: Path, *more: str) -> list[str]:
    options = ["--plan", str(plan), "--corpus", str(texts), "--output_dir", str(output), "--use_cpu"]
    options += ["--vocab_size", "400", "--save_steps", "2", "--logging_steps", "1", "--disable_tqdm", "True"]
    return [*options, "--eval_strategy", "no", *more]


@pytest.fixture(scope="module")
def whole(plan: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run of two phases."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretrain(monkeypatch, *arguments(plan, texts, output))
    return output


def line_of(folder: Path) -> dict[str, Any]:
    (line,) = (folder / "results.jsonl").read_text().splitlines()
    record: dict[str, Any] = json.loads(line)
    return record


def state_of(folder: Path) -> dict[str, Any]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    state: dict[str, Any] = json.loads((newest / "trainer_state.json").read_text())
    return state


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_each_phase_has_its_line_of_results(whole: Path) -> None:
    one, two = (line_of(whole / f"phase-{n}") for n in (1, 2))
    expected = {"plan": "plan.yaml", "phase": 1, "phases": 2, "max_seq_length": 16, "global_batch_size": 16}
    assert {key: one[key] for key in expected} == expected
    assert (one["steps"], one["warmup_steps"], one["learning_rate"]) == (6, 2, 0.02)
    assert (two["phase"], two["max_seq_length"], two["global_batch_size"]) == (2, 32, 8)
    assert (two["steps"], two["warmup_steps"], two["learning_rate"]) == (4, 2, 0.01)


def test_the_model_has_positions_for_the_longest_sequence_from_the_start(whole: Path) -> None:
    name = "bert.embeddings.position_embeddings.weight"
    assert [len(weights(whole / f"phase-{n}")[name]) for n in (1, 2)] == [32, 32]


def test_phase_2_warms_up_again(whole: Path) -> None:
    log = state_of(whole / "phase-2")["log_history"]
    rates = [line["learning_rate"] for line in log if "loss" in line]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.005])


@pytest.mark.parametrize("lost", ["results.jsonl", "checkpoint-6"])
def test_a_run_stopped_at_the_boundary_ends_as_the_whole_one(
    lost: str, whole: Path, plan: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last checkpoint but before the results; before the last checkpoint. Phase 2 has not begun."""
    shutil.copytree(whole / "phase-1", tmp_path / "phase-1")
    (tmp_path / "phase-1/results.jsonl").unlink()
    shutil.rmtree(tmp_path / "phase-1" / lost, ignore_errors=True)
    pretrain(monkeypatch, *arguments(plan, texts, tmp_path, "--resume_from_checkpoint", "auto"))
    for folder in ("phase-1", "phase-2"):
        expected = weights(whole / folder)
        assert all(torch.equal(w, expected[name]) for name, w in weights(tmp_path / folder).items())
        assert line_of(tmp_path / folder)["held_out_loss"] == line_of(whole / folder)["held_out_loss"]
    assert state_of(tmp_path / "phase-1")["global_step"] == 6


def test_a_finished_phase_is_not_repeated(
    whole: Path, plan: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only phase 2 runs, from the middle; then nothing is left to do."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "phase-2/results.jsonl").unlink()
    shutil.rmtree(tmp_path / "phase-2/checkpoint-4")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "phase-1").rglob("*")}
    pretrain(monkeypatch, *arguments(plan, texts, tmp_path, "--resume_from_checkpoint", "latest"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "phase-1").rglob("*")} == before
    expected = weights(whole / "phase-2")
    assert all(torch.equal(w, expected[name]) for name, w in weights(tmp_path / "phase-2").items())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    pretrain(monkeypatch, *arguments(plan, texts, tmp_path, "--resume_from_checkpoint", "latest"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_options_of_the_command_line_hold_for_all_phases(plan: Path) -> None:
    phases = pretrain_bert.parse_phases(["--plan", str(plan), "--max_steps", "3", "--seed", "7"])
    assert [phase.args.max_steps for phase in phases] == [3, 3]
    assert [phase.args.learning_rate for phase in phases] == [0.02, 0.01]
    assert [phase.args.output_dir for phase in phases] == [f"runs/pretrain_bert/plan-lamb/phase-{n}" for n in (1, 2)]


def test_a_plan_of_one_phase_is_an_ordinary_run(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text("size: smoke\nmax_steps: '3'\ncorpus: embedded\nlr_scheduler_type: cosine_with_min_lr\n")
    with file.open("a") as more:
        more.write("lr_scheduler_kwargs: {min_lr_rate: 0.1}\nlearning_rate: 1e-3\nmax_grad_norm: 1\n")
    (phase,) = pretrain_bert.parse_phases(["--plan", str(file)])
    assert (phase.recipe.size, phase.args.max_steps, phase.recipe.corpus) == ("smoke", 3, ["embedded"])
    assert phase.args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert (phase.args.learning_rate, phase.args.max_grad_norm) == (1e-3, 1.0)  # YAML's 1e-3 is text
    assert phase.args.output_dir == "runs/pretrain_bert/one-lamb"


BAD = [
    ("", "holds no options: give lines like `max_steps: 1000`"),
    ("max_steps: [", "is no YAML: while parsing"),
    ("phases: 3", "phases is no list: let each phase begin like `- max_steps: 1000`"),
    ("phases: []", "phases is no list"),
    ("max_step: 3", r"unknown option 'max_step' \(did you mean max_steps\?\)"),
    ("phases:\n- lerning_rate: 3", r"unknown option 'lerning_rate' \(did you mean learning_rate\?\)"),
    ("output_dir: here", "unknown option 'output_dir'"),
    ("max_steps: 10.5", "max_steps 10.5: expected a value of type int"),
    ("learning_rate: {high: 1}", "learning_rate {'high': 1}: expected a value of type float"),
    ("decay_from_first_step: 3", "decay_from_first_step 3: expected true or false"),
    ("learning_rate:", "learning_rate None: give one value"),
    ("max_steps: [3, 4]", r"max_steps \[3, 4\]: give one value"),
    ("save_strategy: no", "save_strategy False: expected one of 'no', 'steps'"),
    ("phases:\n- size: smoke\n- size: tiny", "size is tiny in phase 2 and smoke in phase 1: give it once"),
    ("phases:\n- {save_strategy: 'no'}\n- {}", "--save_strategy no: a phase begins with the last checkpoint"),
    ("phases:\n- {}\n- {max_steps: 3, warmup_steps: 4}", "warmup_steps 4 is more than the run's 3 steps"),
    (
        "phases:\n- {}\n- {global_batch_size: 65536}",
        "65536 is more than the corpus' .* training sequences of 64 tokens",
    ),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_plans_get_one_line_before_anything_is_trained(
    content: str, message: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = tmp_path / "plan.yaml", tmp_path / "out"
    file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        pretrain(monkeypatch, *arguments(file, texts, output))
    (line,) = str(stopped.value.code).splitlines()
    assert re.search(f"^pretrain_bert: .*{message}", line), line
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "tiny"], "plan.yaml is for --size smoke, not tiny: leave --size out, or write size: tiny there"),
        (["--resume_from_checkpoint", "latest"], "--resume_from_checkpoint latest: there is no checkpoint in .*/out"),
        (["--resume_from_checkpoint", "x/checkpoint-4"], "with several phases give latest or auto"),
        (["--plan", "nowhere.yaml"], r"nowhere.yaml cannot be read \(No such file or directory\): `python -m hf_lamb"),
    ],
)
def test_bad_commands_get_one_line(
    more: list[str], message: str, plan: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretrain(monkeypatch, *arguments(plan, texts, tmp_path / "out", *more))
    (line,) = str(stopped.value.code).splitlines()
    assert re.search(f"^pretrain_bert: .*{message}", line), line
    assert not (tmp_path / "out").exists()


def test_phases_under_deepspeed_get_one_line_before_anything_is_trained(
    plan: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """start_from would refuse it only when phase 2 begins."""
    post_init = LambTrainingArguments.__post_init__

    def launched_by_deepspeed(args: LambTrainingArguments) -> None:
        post_init(args)
        args.deepspeed_plugin = object()

    monkeypatch.setattr(LambTrainingArguments, "__post_init__", launched_by_deepspeed)
    with pytest.raises(SystemExit) as stopped:
        pretrain(monkeypatch, *arguments(plan, texts, tmp_path / "out"))
    (line,) = str(stopped.value.code).splitlines()
    assert re.search("^pretrain_bert: --plan .*plan.yaml has 2 phases: train it with DDP or FSDP2", line), line
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_not_overwritten(
    whole: Path, plan: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run: add --resume_from_checkpoint latest"):
        pretrain(monkeypatch, *arguments(plan, texts, whole))


def test_a_phase_whose_predecessor_did_not_end_does_not_begin(
    whole: Path, plan: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last checkpoint was deleted after it was finished."""
    shutil.copytree(whole / "phase-1", tmp_path / "phase-1")
    shutil.rmtree(tmp_path / "phase-1/checkpoint-6")
    with pytest.raises(SystemExit, match=r"checkpoint-4 is not the end of its phase \(4 of 6 steps\)"):
        pretrain(monkeypatch, *arguments(plan, texts, tmp_path, "--resume_from_checkpoint", "latest"))


SHARDED = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"]}
FSDP2 = ["--fsdp", "--fsdp_config", json.dumps({**SHARDED, "state_dict_type": "SHARDED_STATE_DICT"})]


@pytest.mark.distributed
@pytest.mark.parametrize("options", [[], FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_go_through_the_same_phases(
    options: list[str], whole: Path, plan: Path, texts: Path, tmp_path: Path
) -> None:
    """The same weights to rounding after phase 2, and the same to the bit where phase 2 is begun anew."""
    command = ["tests.scripts.cpu_fsdp", "recipes.pretrain_bert", *arguments(plan, texts, tmp_path, *options)]
    command += ["--per_device_train_batch_size", "4"]
    torchrun(2, *command)
    assert (tmp_path / "phase-1/checkpoint-6/pytorch_model_fsdp_0").exists() == bool(options)
    expected, got = weights(whole / "phase-2"), weights(tmp_path / "phase-2")
    for name, weight in got.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert line_of(tmp_path / "phase-2")["processes"] == 2
    shutil.rmtree(tmp_path / "phase-2")
    torchrun(2, *command, "--resume_from_checkpoint", "auto")
    assert all(torch.equal(weight, got[name]) for name, weight in weights(tmp_path / "phase-2").items())
