"""The pretraining of `recipes.pretrain_bert` without Trainer: plain PyTorch and Accelerate, to read and to change.

accelerate launch --num_processes 1 -m recipes.accelerate_loop --size mini --global_batch_size 1024
accelerate launch --config_file recipes/configs/accelerate/fsdp2.yaml -m recipes.accelerate_loop --resume
"""

import json
import shutil
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import SeedableRandomSampler
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    set_seed,
)
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_lamb import Lamb, lamb_param_groups, tied_heads_in_one_group
from hf_lamb.batch_schedule import BatchStages, batch_stages
from hf_lamb.command_line import fail, stopped
from hf_lamb.scaling import check_warmup, decay_factor
from recipes.lib.bert import SIZES, new_bert
from recipes.lib.console import command_to_fill_masks, on_a_terminal, show_library_bars, step_line, what_next
from recipes.lib.options import RecipeParser, parse_options
from recipes.lib.pretraining import Data, PretrainingArguments, changes, load_data
from recipes.lib.processes import (
    accumulation_of,
    asked_for_and_off,
    check_connected,
    kind_of,
    micro_batch_of,
    only_run_in,
)
from recipes.lib.report import append_json_line, hardware, provenance

DATA_FILE = "data.json"

# Of each checkpoint accelerate says that it leaves out the head's weight, which BERT ties to the embedding and finds
# there again.
getLogger("accelerate.utils.other").addFilter(lambda record: "Removed shared tensor" not in record.getMessage())


@dataclass
class LoopArguments:
    """The options of the loop. `accelerate launch` has those of mixed precision and parallelism."""

    size: str = field(default="tiny", metadata={"help": "Model size.", "choices": list(SIZES)})
    corpus: list[str] = field(default_factory=lambda: ["embedded"], metadata={"help": "As recipes.pretrain_bert's."})
    vocab_size: int = field(default=8192, metadata={"help": "Vocabulary of the tokenizer that is trained."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens in a training sequence."})
    global_batch_size: int = field(default=64, metadata={"help": "Sequences in an optimizer step."})
    batch_size_schedule: str | None = field(
        default=None,
        metadata={"help": "In place of it: batches from given steps on, '0:64 1000:128', or '64->128 over 1000'."},
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Sequences at a time on each process; default: at most 32, as many as fit."}
    )
    max_steps: int = field(default=2400, metadata={"help": "Optimizer steps."})
    warmup_steps: int | None = field(
        default=None, metadata={"help": "Steps in which the rate rises; default: a tenth of them."}
    )
    learning_rate: float = field(default=1e-2, metadata={"help": "The peak, at the end of the warm-up."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of weights; biases and norms do not decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "The norm that gradients are clipped to."})
    seed: int = field(default=42, metadata={"help": "Of weights, data order and masks."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between two values in the log."})
    save_steps: int = field(default=240, metadata={"help": "Steps between two checkpoints, and evaluations."})
    output_dir: str = field(default="runs/accelerate_loop", metadata={"help": "The folder of the run."})
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint, if there is one."})
    report_to: str = field(default="tensorboard", metadata={"help": "A tracker of Accelerate's, or 'none'."})
    comm_hook: str = field(
        default="no",
        metadata={
            "help": "What DDP compresses gradients to when it averages them: fewer bytes on a slow network.",
            "choices": ["no", "fp16", "bf16"],
        },
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use no accelerator."})


def main() -> None:
    """Train, evaluate, save; one line of results in the output directory."""
    with ExitStack() as until_the_end:
        accelerator, *run = prepare(until_the_end)
        try:
            train(accelerator, *run)
        except KeyboardInterrupt:
            if accelerator.is_main_process:
                stopped("accelerate_loop", "the same command with --resume goes on")
            sys.exit(130)
        accelerator.end_training()


def prepare(until_the_end: ExitStack) -> tuple[Accelerator, LoopArguments, Data, BatchStages, Path | None]:
    """The arguments of `train`; where an option is wrong, the program ends with one line.

    until_the_end: gets the lock of the output folder.
    """
    show_library_bars(on_a_terminal())
    try:
        (args,) = parse_options(RecipeParser(LoopArguments, "accelerate_loop", __doc__))
        tracker = None if args.report_to == "none" else args.report_to
        if tracker and tracker not in [str(name) for name in get_available_trackers()]:
            raise ValueError(f"--report_to {tracker} is no tracker that is installed: give none, or install it")
        hook = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType(args.comm_hook))
        accelerator = Accelerator(
            cpu=args.use_cpu, log_with=tracker, project_dir=args.output_dir, kwargs_handlers=[hook]
        )
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "DeepSpeed steps inside backward, which this loop does not support: use recipes.pretrain_bert"
            )
        check_connected(accelerator.num_processes)
        check_hook(args.comm_hook, accelerator)
        schedule, processes = args.batch_size_schedule or f"0:{args.global_batch_size}", accelerator.num_processes
        if args.per_device_train_batch_size is None:
            smallest = min(stage.batch_size for stage in batch_stages(schedule).stages)
            args.per_device_train_batch_size = micro_batch_of(smallest, processes)
        if args.batch_size_schedule is None:
            accumulation_of(args.global_batch_size, args.per_device_train_batch_size, processes)  # whole, or an error
        stages = batch_stages(schedule, args.per_device_train_batch_size * processes)
        if args.warmup_steps is None:
            args.warmup_steps = args.max_steps // 10
        check_warmup(args.warmup_steps, args.max_steps)
        newest = newest_checkpoint(Path(args.output_dir))
        if newest and not args.resume:
            raise ValueError(f"{args.output_dir} holds {newest.name}: add --resume, or --output_dir for another place")
        before = written_facts(newest)
        warnings = take_options_of(before.get("arguments", {}), args)
        with accelerator.main_process_first():
            names = ("size", "corpus", "vocab_size", "max_seq_length")
            arguments = PretrainingArguments(**{name: getattr(args, name) for name in names})
            data = load_data(arguments, args.seed, str(newest) if newest else None)
        until_the_end.enter_context(only_run_in([args.output_dir], accelerator.is_main_process))
    except (ValueError, OSError) as error:
        fail("accelerate_loop", error)
    if accelerator.is_main_process:
        print(
            f"BERT-{args.size}, global batch {args.batch_size_schedule or args.global_batch_size}, in passes of "
            f"{args.per_device_train_batch_size} sequences x {processes} processes; {args.max_steps:,} steps\n"
            f"{kind_of(accelerator)} on {hardware()}"
        )
        for line in [*asked_for_and_off(accelerator), *warnings, *changes(before or None, data.facts)]:
            print(f"warning: {line}")
        if newest:
            print(f"resuming from {newest}, step {step_of(newest):,} of {args.max_steps:,}")
    return accelerator, args, data, stages, newest


def written_facts(newest: Path | None) -> dict[str, Any]:
    """What a checkpoint says of its run, or nothing."""
    file = Path(newest, DATA_FILE) if newest else None
    return json.loads(file.read_text()) if file and file.exists() else {}


def take_options_of(kept: dict[str, Any], args: LoopArguments) -> list[str]:
    """Give `args` the options that the checkpoint's optimizer keeps; a line for each that is another one.

    kept: the arguments of the run that wrote it. Raises ValueError for another model.
    """
    kept = asdict(args) | kept  # a checkpoint of an earlier version does not say
    for name in ("size", "max_seq_length"):
        if kept[name] != getattr(args, name):
            raise ValueError(
                f"--{name} {getattr(args, name)}: the checkpoint's run had {kept[name]}: give that, or --output_dir "
                "for another run"
            )
    lines = []
    for name in ("learning_rate", "weight_decay"):
        if kept[name] != getattr(args, name):
            lines.append(f"--{name} {getattr(args, name)}: the checkpoint's optimizer goes on with {kept[name]}")
            setattr(args, name, kept[name])
    constant = kept["batch_size_schedule"] is None and args.batch_size_schedule is None
    batch = kept["global_batch_size"]
    if constant and batch != args.global_batch_size:
        lines.append(
            f"--global_batch_size {args.global_batch_size}: the checkpoint's run had {batch}, so this one goes on at "
            "another place in the data; for a batch that changes give --batch_size_schedule"
        )
    return lines


def check_hook(comm_hook: str, accelerator: Accelerator) -> None:
    """Raise ValueError where nothing is averaged by DDP, and where torch has no such hook."""
    if comm_hook == "no":
        return
    if "processes, DDP" not in (kind := kind_of(accelerator)):
        raise ValueError(
            f"--comm_hook {comm_hook}: leave it out, it is for DDP on several processes, and this is {kind}"
        )
    if comm_hook == "bf16" and accelerator.device.type == "cpu":
        raise ValueError("--comm_hook bf16: give fp16 or leave it out: torch has its bf16 hook on GPUs only")


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.partition("-")[2])


def train(accelerator: Accelerator, args: LoopArguments, data: Data, stages: BatchStages, newest: Path | None) -> None:
    """Train and save; `stages` say how many micro-batches each step takes on each process."""
    set_seed(args.seed)
    model = new_bert(args.size, data.tokenizer, args.max_seq_length)
    lamb = Lamb(lamb_param_groups(model, args.weight_decay), lr=args.learning_rate)
    order = SeedableRandomSampler(data.train, generator=torch.Generator(), data_seed=args.seed)
    loader = DataLoader(data.train, args.per_device_train_batch_size, sampler=order)
    held_out = DataLoader(data.held_out, args.per_device_train_batch_size)
    with tied_heads_in_one_group(model):  # for FSDP2
        model, optimizer, loader, held_out = accelerator.prepare(model, lamb, loader, held_out)
    lamb.attach(model)  # for FSDP1
    # Not prepared: Accelerate would move the schedule on by the number of processes.
    shape = partial(decay_factor, total_steps=args.max_steps, warmup_steps=args.warmup_steps)
    schedule = LambdaLR(lamb, shape)
    accelerator.register_for_checkpointing(schedule)
    if accelerator.log_with:
        accelerator.init_trackers("accelerate_loop", {name: str(value) for name, value in asdict(args).items()})

    step, losses, metrics = 0, [], {}
    if newest:
        accelerator.load_state(str(newest))
        step = step_of(newest)
        for group, rate in zip(lamb.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = rate * shape(schedule.last_epoch)  # not the checkpoint's where --max_steps is another one
    # None: off where stderr is no terminal; there, lines take its place
    bar = tqdm(total=args.max_steps, initial=step, disable=None if accelerator.is_local_main_process else True)
    say = partial(print, flush=True) if accelerator.is_main_process and bar.disable else lambda _: None
    while step < args.max_steps:
        epoch, done = stages.position(step, len(loader))
        data.train.set_epoch(epoch)  # the masks
        order.set_epoch(epoch)
        rest = skip_first_batches(loader, done)
        rest.set_epoch(epoch)
        batches = iter(rest)
        while step < args.max_steps and (micro_batches := list(islice(batches, stages.at(step).accumulation))):
            model.train()
            losses.append(forward_and_backward(accelerator, model, micro_batches))
            norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            rate = lamb.param_groups[0]["lr"]
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # by the GradScaler of fp16
                schedule.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            if step % args.logging_steps == 0:
                loss = torch.stack(losses).mean().item()
                ratios = [s.trust_ratio for s in lamb.layer_stats(adapted_only=True).values()]
                norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2's
                values = {"loss": loss, "learning_rate": rate, "grad_norm": float(norm)}
                if ratios:  # none where all of this step's gradients are zero
                    values["trust_ratio_median"] = sorted(ratios)[len(ratios) // 2]
                accelerator.log(values, step=step)
                say(step_line(step, args.max_steps, values))
                bar.set_postfix(loss=f"{loss:.3f}")
                losses = []
            if step % args.save_steps == 0 or step == args.max_steps:
                metrics = evaluate(accelerator, model, held_out)
                accelerator.log(metrics, step=step)
                say(step_line(step, args.max_steps, metrics))
                facts = data.facts | {"arguments": asdict(args)}
                save_checkpoint(accelerator, Path(args.output_dir), step, data.tokenizer, facts)
    bar.close()
    metrics = metrics or evaluate(accelerator, model, held_out)
    weights, bare = accelerator.get_state_dict(model), accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        once = {name: weight for name, weight in weights.items() if name not in bare.all_tied_weights_keys}
        bare.save_pretrained(args.output_dir, state_dict=once)
        data.tokenizer.save_pretrained(args.output_dir)
        record = provenance() | asdict(args) | {"processes": accelerator.num_processes} | metrics
        append_json_line(Path(args.output_dir, "results.jsonl"), record | {"unigram_loss": data.unigram_loss})
        print(summary(args, metrics, data))
    accelerator.wait_for_everyone()


def summary(args: LoopArguments, metrics: dict[str, float], data: Data) -> str:
    """What is printed after the training."""
    commands = {"try it": command_to_fill_masks(args.output_dir, data.tokenizer.mask_token)}
    if args.report_to == "tensorboard":
        commands["its curves"] = f"tensorboard --logdir {args.output_dir}"
    return f"""
held-out masked-LM loss  {metrics["held_out_loss"]:.3f} nats   unigrams {data.unigram_loss:.3f} nats
held-out accuracy        {metrics["held_out_accuracy"]:.1%}        unigrams {data.unigram_accuracy:.1%}
model                    {args.output_dir} (AutoModelForMaskedLM.from_pretrained)
results                  {args.output_dir}/results.jsonl
{what_next(commands)}"""


def forward_and_backward(accelerator: Accelerator, model: Any, micro_batches: list[dict[str, Any]]) -> torch.Tensor:
    """The gradient of the mean loss over all labels of the global batch; returns that loss.

    Each micro-batch counts by its labels, times the processes, because DDP and FSDP average their gradients.
    """
    counts = torch.stack([(batch["labels"] != -100).sum() for batch in micro_batches])
    total = accelerator.reduce(counts.sum(), "sum")
    own = torch.zeros((), device=accelerator.device)
    for i, (batch, count) in enumerate(zip(micro_batches, counts, strict=True)):
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            loss = model(**batch).loss * count / total
            accelerator.backward(loss * accelerator.num_processes)
        own += loss.detach()
    return accelerator.reduce(own, "sum")


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: Any, held_out: DataLoader[Any]) -> dict[str, float]:
    """Mean loss and accuracy over all masked positions; rows that only fill up the last batch do not count."""
    model.eval()
    sums = torch.zeros(3, device=accelerator.device)
    for batch in held_out:
        labels = batch.pop("labels")
        logits = model(**batch).logits.float().transpose(1, 2)
        loss, hit = cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels
        rows = torch.stack([loss.sum(1), hit.sum(1), (labels != -100).sum(1)], dim=1)
        sums += accelerator.gather_for_metrics(rows).sum(0)
    loss, hits, labels = sums.tolist()
    return {"held_out_loss": loss / labels, "held_out_accuracy": hits / labels}


def newest_checkpoint(output: Path) -> Path | None:
    """checkpoint-N with the highest N."""
    return max(output.glob("checkpoint-*"), key=step_of, default=None)


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, tokenizer: Any, facts: dict[str, Any]) -> None:
    """Write a checkpoint, and rename it to checkpoint-N when every process has written its part; keep the one before.

    It holds the tokenizer, and the facts with which a resumed run checks that its data are the same.
    """
    unfinished, before = output / "unfinished", newest_checkpoint(output)
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        tokenizer.save_pretrained(unfinished)
        (unfinished / DATA_FILE).write_text(json.dumps(facts))
        unfinished.rename(output / f"checkpoint-{step}")
        for old in set(output.glob("checkpoint-*")) - {before, output / f"checkpoint-{step}"}:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
