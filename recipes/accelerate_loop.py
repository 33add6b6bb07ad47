"""The pretraining of `recipes.pretrain_bert` without Trainer: plain PyTorch and Accelerate, to read and to change.

accelerate launch --num_processes 1 -m recipes.accelerate_loop --size mini --global_batch_size 1024
accelerate launch --config_file recipes/configs/accelerate/fsdp2.yaml -m recipes.accelerate_loop --resume
"""

import json
import math
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import SeedableRandomSampler
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_lamb import Lamb, lamb_param_groups, tied_heads_in_one_group
from hf_lamb.scaling import check_warmup, decay_factor
from recipes.bert import SIZES, new_bert
from recipes.pretrain_bert import Data, RecipeArguments, load_data, make_output_dir
from recipes.report import append_json_line, provenance


@dataclass
class LoopArguments:
    """Mixed precision and the kind of parallelism are `accelerate launch`'s."""

    size: str = field(default="tiny", metadata={"help": "Model size.", "choices": list(SIZES)})
    corpus: list[str] = field(default_factory=lambda: ["embedded"], metadata={"help": "As recipes.pretrain_bert's."})
    vocab_size: int = 8192
    max_seq_length: int = 64
    global_batch_size: int = field(default=64, metadata={"help": "Sequences in an optimizer step."})
    per_device_train_batch_size: int = 32
    max_steps: int = 2400
    warmup_steps: int = 240
    learning_rate: float = 1e-2
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 42
    logging_steps: int = 10
    save_steps: int = field(default=240, metadata={"help": "Steps between two checkpoints, and evaluations."})
    output_dir: str = "runs/accelerate_loop"
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint, if there is one."})
    report_to: str = field(default="tensorboard", metadata={"help": "A tracker of Accelerate's, or 'none'."})
    use_cpu: bool = False


def main() -> None:
    """Train, evaluate, save; one line of results in the output directory."""
    try:
        (args,) = HfArgumentParser(LoopArguments).parse_args_into_dataclasses()
        tracker = None if args.report_to == "none" else args.report_to
        if tracker and tracker not in [str(name) for name in get_available_trackers()]:
            raise ValueError(f"--report_to {tracker} is no tracker that is installed: give none, or install it")
        accelerator = Accelerator(cpu=args.use_cpu, log_with=tracker, project_dir=args.output_dir)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "DeepSpeed steps inside of backward, which this loop is not for: use recipes.pretrain_bert"
            )
        at_once = args.per_device_train_batch_size * accelerator.num_processes
        if min(args.global_batch_size, at_once) < 1 or args.global_batch_size % at_once:
            raise ValueError(f"--global_batch_size {args.global_batch_size} is no multiple of {at_once} at a time")
        check_warmup(args.warmup_steps, args.max_steps)
        with accelerator.main_process_first():
            names = ("size", "corpus", "vocab_size", "max_seq_length")
            data = load_data(RecipeArguments(**{name: getattr(args, name) for name in names}), args.seed)
        make_output_dir(args.output_dir)
        newest = newest_checkpoint(Path(args.output_dir))
        if newest and not args.resume:
            raise ValueError(f"{args.output_dir} holds {newest.name}: add --resume, or --output_dir for another place")
    except (ValueError, OSError) as error:
        sys.exit(f"accelerate_loop: {' '.join(str(error).split())}")
    train(accelerator, args, data, args.global_batch_size // at_once, newest)
    accelerator.end_training()


def train(accelerator: Accelerator, args: LoopArguments, data: Data, accumulation: int, newest: Path | None) -> None:
    """Every step takes `accumulation` micro-batches on each process."""
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
        step = int(newest.name.partition("-")[2])
    bar = tqdm(total=args.max_steps, initial=step, disable=not accelerator.is_local_main_process)
    steps_per_epoch = math.ceil(len(loader) / accumulation)
    while step < args.max_steps:
        epoch, done = divmod(step, steps_per_epoch)
        data.train.set_epoch(epoch)  # the masks
        order.set_epoch(epoch)
        rest = skip_first_batches(loader, done * accumulation)
        rest.set_epoch(epoch)
        batches = iter(rest)
        while step < args.max_steps and (micro_batches := list(islice(batches, accumulation))):
            model.train()
            losses.append(forward_and_backward(accelerator, model, micro_batches))
            norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            rate = schedule.get_last_lr()[0]
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
                accelerator.log(values | {"trust_ratio_median": sorted(ratios)[len(ratios) // 2]}, step=step)
                bar.set_postfix(loss=f"{loss:.3f}")
                losses = []
            if step % args.save_steps == 0 or step == args.max_steps:
                metrics = evaluate(accelerator, model, held_out)
                accelerator.log(metrics, step=step)
                save_checkpoint(accelerator, Path(args.output_dir), step)
    bar.close()
    metrics = metrics or evaluate(accelerator, model, held_out)
    weights, bare = accelerator.get_state_dict(model), accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        once = {name: weight for name, weight in weights.items() if name not in bare.all_tied_weights_keys}
        bare.save_pretrained(args.output_dir, state_dict=once)
        data.tokenizer.save_pretrained(args.output_dir)
        record = provenance() | asdict(args) | {"processes": accelerator.num_processes} | metrics
        append_json_line(Path(args.output_dir, "results.jsonl"), record | {"unigram_loss": data.unigram_loss})
        print(json.dumps(metrics | {"unigram_loss": data.unigram_loss}))
    accelerator.wait_for_everyone()


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
    return max(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), default=None)


def save_checkpoint(accelerator: Accelerator, output: Path, step: int) -> None:
    """Whole or not there: it gets its name when every process has written its part; the one before is kept."""
    unfinished, before = output / "unfinished", newest_checkpoint(output)
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(output / f"checkpoint-{step}")
        for old in set(output.glob("checkpoint-*")) - {before, output / f"checkpoint-{step}"}:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
