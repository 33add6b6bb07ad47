"""What LambTrainer's extras cost: their share of the time of a step of the pretraining recipe, by Python's profiler.

    python -m benchmarks.bench_trainer [--output benchmarks/results/trainer.jsonl] [options of recipes.pretrain_bert]

Extras: weighting the loss by labels, the gradient noise scale, trust ratios and skipped steps in the logs; that is,
all that runs in `hf_lamb.trainer` and in what these call, but for Trainer's own methods. Evaluations and
checkpoints are off; eight accumulation steps of the recipe's own micro-batch. The profiler slows Python code down, not
tensor operations, so the share is rather too high.
"""

import argparse
import contextlib
import cProfile
import pstats
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from transformers import TrainerCallback

import hf_lamb.scaling
import hf_lamb.trust_ratios
from benchmarks.records import stamp
from hf_lamb import LambTrainer
from recipes import pretrain_bert
from recipes.lib.bert import new_bert
from recipes.lib.masking import MaskEpochCallback
from recipes.lib.pretraining import load_data
from recipes.lib.report import append_json_line

EXTRAS = {module.__file__ for name, module in sys.modules.items() if name.startswith("hf_lamb.trainer.")}
EXTRAS |= {hf_lamb.scaling.__file__, hf_lamb.trust_ratios.__file__}
WARM_UP, STEPS = 10, 50
RECIPE = ["--global_batch_size", "256", "--per_device_train_batch_size", "32", "--max_steps", str(WARM_UP + STEPS)]
RECIPE += ["--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True"]


class ProfileSteps(TrainerCallback):
    """From the end of the warm-up to the end of the run."""

    def __init__(self) -> None:
        self.profile = cProfile.Profile()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.profile.enable()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.profile.disable()


def time_in_extras(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds in each function of the extras: its own, and in what it calls, but for Trainer and other extras."""
    stats: Any = pstats.Stats(profile)
    seconds: dict[str, float] = {}
    for function, (_, _, own, _, callers) in stats.stats.items():
        if function[0] in EXTRAS:
            seconds[name(function)] = seconds.get(name(function), 0.0) + own
        elif function[0] not in (transformers.trainer.__file__, contextlib.__file__):  # whose blocks are of the extras
            for caller, (_, _, _, cumulative) in callers.items():
                if caller[0] in EXTRAS:
                    seconds[name(caller)] = seconds.get(name(caller), 0.0) + cumulative
    return seconds


def name(function: tuple[str, int, str]) -> str:
    return f"{Path(function[0]).stem}.{function[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON lines to add the result to")
    own, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    recipe, args = pretrain_bert.parse([*RECIPE, *rest])
    data = load_data(recipe, args.seed)
    torch.manual_seed(args.seed)
    steps = ProfileSteps()
    trainer = LambTrainer(
        model=new_bert(recipe.size, data.tokenizer, recipe.max_seq_length),
        args=args,
        train_dataset=data.train,
        processing_class=data.tokenizer,
        callbacks=[MaskEpochCallback(), steps],
    )
    trainer.train()
    seconds = time_in_extras(steps.profile)
    total = pstats.Stats(steps.profile).total_tt  # type: ignore[attr-defined]
    count = args.max_steps - WARM_UP
    share = sum(seconds.values()) / total
    for function, spent in sorted(seconds.items(), key=lambda item: -item[1])[:12]:
        print(f"{spent / count * 1e3:8.3f} ms  {spent / total:7.3%}  {function}")
    accumulation = args.gradient_accumulation_steps
    print(f"{total / count * 1e3:.1f} ms a step of {accumulation} micro-batches, {share:.2%} in LambTrainer's extras")
    if own.output:
        record = stamp() | {"size": recipe.size, "gradient_accumulation_steps": accumulation, "steps": count}
        record |= {"per_device_train_batch_size": args.per_device_train_batch_size}
        append_json_line(own.output, record | {"seconds_per_step": total / count, "share_of_extras": share})


if __name__ == "__main__":
    main()
