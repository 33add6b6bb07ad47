"""The loss as a function of the weights: L(y) and ∇L(y) over fixed batches, for a copy y of a model's weights.

An `Objective` never writes to the model's parameters. While it is open, the model computes with copies, which the
metrics move. When it closes, the model has its own parameters, modes and buffers again, the same objects as before.
Memory: y and ∇L(y), two copies of the trainable weights.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.data import default_collate

from hf_lamb.sharding import ShardingError


class BatchLoss(NamedTuple):
    """What a loss function returns for a batch."""

    loss: Tensor  # the mean over the items, 0-dim
    items: Tensor | int = 1  # number of rows or labelled tokens that the mean is over: the batch's weight
    correct: Tensor | int | None = (
        None  # number of items that were predicted correctly; None if there is no such thing
    )


class Scores(NamedTuple):
    """Mean loss and accuracy over all items of all batches."""

    loss: float
    accuracy: float | None  # None if the loss function returns no `correct`


LossFn = Callable[[Any, Any], Tensor | BatchLoss]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> BatchLoss:
    """Return the mean cross-entropy, in nats, of a batch `(inputs, classes)`; `model(inputs)` are logits [rows, n]."""
    inputs, classes = batch
    logits = model(inputs)
    correct = (logits.argmax(dim=-1) == classes).sum()
    return BatchLoss(nn.functional.cross_entropy(logits, classes), classes.numel(), correct)


def labels_loss(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
    """Return the loss of a Hugging Face model for inputs with `labels`: the mean over the labels that are not -100.

    The accuracy is returned too if labels are classes, also for causal language models.

    Raises:
        ValueError: the batch is not a mapping with labels, or the model returns no loss.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        what = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"a batch has no labels ({what}): give mappings with labels, or your own loss_fn")
    outputs = model(**batch)
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} returns no loss for these labels: pass your own loss_fn")
    labels, logits = batch["labels"], getattr(outputs, "logits", None)
    if labels.is_floating_point():
        return BatchLoss(loss, labels.shape[0])
    if "ForCausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        labels = labels[..., 1:]
        logits = logits if logits is None else logits[..., :-1, :]
    counted = labels != -100
    if logits is None or logits.shape[:-1] != labels.shape:
        return BatchLoss(loss, counted.sum())
    return BatchLoss(loss, counted.sum(), (logits.argmax(dim=-1) == labels)[counted].sum())


class Objective:
    """L and ∇L at `weights`, which are copies of the model's trainable parameters that callers may change.

    Under DistributedDataParallel every process has its own batches, and all get the loss, the accuracy and the
    gradient over the batches of all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: list[Any],
        centers: dict[str, Tensor],
        weights: dict[str, nn.Parameter],
        group: ProcessGroup | None,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.batches = batches
        self.centers = centers
        self.weights = weights
        self.group = group
        self.device = next(iter(weights.values())).device

    def pairs(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """Yield (w, y) for every trainable tensor: its original value, in y's dtype, and its present value."""
        for name, y in self.weights.items():
            yield self.centers[name].to(y.dtype), y

    def gradient(self) -> float:
        """Return L(y), and write ∇L(y) to `y.grad`."""
        for y in self.weights.values():
            y.grad = torch.zeros_like(y) if y.grad is None else y.grad.zero_()
        loss, _, items = self._total(self._backward)
        for y in self.weights.values():
            assert y.grad is not None
            if self.group is not None:
                dist.all_reduce(y.grad, group=self.group)
            y.grad.div_(items)
        return loss

    def scores(self) -> Scores:
        """Return L(y) and the accuracy; `y.grad` does not change."""
        with torch.no_grad():
            loss, accuracy, _ = self._total(None)
        return Scores(loss, accuracy)

    def value(self) -> float:
        """Return L(y), or inf if it is NaN, so that comparisons work."""
        loss = self.scores().loss
        return math.inf if math.isnan(loss) else loss

    def hessian_times(self, v: Mapping[str, Tensor]) -> None:
        """Write Hv at y to `y.grad`: the gradient of ∇L·v, by differentiating twice."""
        for y in self.weights.values():
            y.grad = torch.zeros_like(y) if y.grad is None else y.grad.zero_()
        ys = list(self.weights.values())

        def twice(loss: Tensor) -> None:
            # Only torch's plain attention can be differentiated twice:
            # https://github.com/pytorch/pytorch/issues/116350
            gradients = torch.autograd.grad(loss, ys, create_graph=True, allow_unused=True)
            parts = [
                (g * v[name]).sum()
                for g, name in zip(gradients, self.weights, strict=True)
                if g is not None and g.requires_grad
            ]
            if parts:
                torch.stack(parts).sum().backward(inputs=ys)  # type: ignore[no-untyped-call]

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            _, _, items = self._total(twice)
        for y in ys:
            assert y.grad is not None
            if self.group is not None:
                dist.all_reduce(y.grad, group=self.group)
            y.grad.div_(items)

    def _backward(self, loss: Tensor) -> None:
        if loss.requires_grad:  # False if the loss does not depend on these weights: their gradient is then zero
            loss.backward(inputs=list(self.weights.values()))  # type: ignore[no-untyped-call]

    def _total(self, visit: Callable[[Tensor], None] | None) -> tuple[float, float | None, float]:
        """Return mean loss, accuracy and items over all processes' batches; call `visit` with each summed loss."""
        _seed(0)  # so that a loss that draws random numbers is the same function every time
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, items, correct, batches that count it
        for batch in self.batches:
            given = self.loss_fn(self.model, _to(batch, self.device))
            loss, items, correct = given if isinstance(given, BatchLoss) else BatchLoss(given)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError(f"loss_fn returned {_shown(loss)} for a batch: expected the mean loss, one number")
            total = loss * items
            if visit is not None:
                visit(total)
            with torch.no_grad():
                parts = (total, items, 0 if correct is None else correct, 0 if correct is None else 1)
                sums += torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in parts])
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        loss_sum, items_sum, right, counted = sums.tolist()
        if items_sum == 0:
            raise ValueError(
                "the batches have no labels: check that they are not empty and that labels are not all -100"
            )
        return loss_sum / items_sum, right / items_sum if counted else None, items_sum


@contextmanager
def objective(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], group: ProcessGroup | None = None
) -> Iterator[Objective]:
    """Yield the loss of a model over fixed batches as a function of its trainable weights, in eval mode and float32.

    float64 models stay float64. Autocast is off. When the block ends, also by an exception, the model and all random
    number generators are as before, to the bit.

    Args:
        model: any module; wrappers are removed.
        loss_fn: see `epsilon_sharpness`.
        batches: read once and kept.
        group: processes that share the batches. Default: those of a DistributedDataParallel model.

    Raises:
        hf_lamb.ShardingError: parameters are sharded by FSDP, tensor parallelism or ZeRO-3.
        ValueError: there are no batches or no trainable parameters.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
    model = unwrapped(model)
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())
        fixed = list(batches)
        if not fixed and group is None:
            raise ValueError("no batches to compute the loss over: pass at least one")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        centers, weights = stack.enter_context(_moved_to_copies(model))
        device = next(iter(weights.values())).device
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield Objective(model, loss_fn, fixed, centers, weights, group)


def check_loss(loss: float) -> float:
    """Return the loss at the model's own weights; raise ValueError if it is not finite."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss at the given weights is {loss}: check the batches, it must be finite")
    return loss


def fixed_batches(
    dataset: Sequence[Any],
    batch_size: int,
    count: int | None = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    seed: int = 0,
) -> list[Any]:
    """Make batches of rows that are spread evenly over a dataset. `collate_fn` runs once, so its masks are constant.

    The global random number generators are not affected.

    Args:
        dataset: the rows.
        batch_size: rows per batch.
        count: number of batches. Default None: as many as the dataset fills.
        collate_fn: turns a list of rows into a batch. Default torch's.
        seed: for random numbers in `collate_fn`; the same seed gives the same batches. Default 0.

    Raises:
        ValueError: the dataset has fewer rows than one batch.
    """
    most = len(dataset) // batch_size
    count = most if count is None else min(count, most)
    if count < 1:
        raise ValueError(f"{len(dataset)} rows make no batch of {batch_size}: lower batch_size")
    rows = [i * len(dataset) // (count * batch_size) for i in range(count * batch_size)]
    with preserved_random_state():
        _seed(seed)
        starts = range(0, len(rows), batch_size)
        return [collate_fn([dataset[i] for i in rows[start : start + batch_size]]) for start in starts]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random number generators of Python, NumPy and torch (all devices in use) when the block ends."""
    numpy = sys.modules.get("numpy.random")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.get_state()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _seed(seed: int) -> None:
    """Seed the generators that `preserved_random_state` restores; `torch.manual_seed` would seed CUDA for later."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@contextmanager
def _moved_to_copies(model: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, nn.Parameter]]]:
    """Make the model compute with copies of its parameters, in eval mode; restore everything when the block ends.

    float16 and bfloat16 become float32 in the copies and, in this block, in frozen parameters and buffers.

    Yields:
        The trainable parameters and their copies, by name.
    """
    refuse_sharded(model)
    names = {id(p): name for name, p in model.named_parameters()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    if not trainable:
        raise ValueError(f"unfreeze some parameters: {type(model).__name__} has none that requires a gradient")

    stand_ins: dict[int, nn.Parameter] = {}

    def stand_in(p: nn.Parameter) -> nn.Parameter:  # one copy for each parameter, even if several modules share it
        if id(p) not in stand_ins:
            data = p.detach().to(_wide(p.dtype), copy=names[id(p)] in trainable)
            stand_ins[id(p)] = nn.Parameter(data, requires_grad=p.requires_grad)
        return stand_ins[id(p)]

    modules = list(model.modules())
    modes = [module.training for module in modules]
    parameters = [(m, n, p) for m in modules for n, p in m._parameters.items() if p is not None]
    buffers = [(m, n, b) for m in modules for n, b in m._buffers.items() if b is not None]
    # accelerate's mixed precision wraps `forward` in its own autocast and keeps the original in `_original_forward`.
    wrapped = {m: m.__dict__["forward"] for m in modules if {"_original_forward", "forward"} <= vars(m).keys()}
    # Compiled code uses the original parameters and cannot be differentiated twice.
    compiled = {m: m._compiled_call_impl for m in modules if m._compiled_call_impl is not None}
    try:
        for module in modules:
            module.training = False
        for module, name, p in parameters:
            if p.is_floating_point():
                setattr(module, name, stand_in(p))  # setattr, because recurrent layers also keep a list of them
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.to(_wide(buffer.dtype), copy=True)
        for module in wrapped:
            module.__dict__["forward"] = module.__dict__["_original_forward"]
        for module in compiled:
            module._compiled_call_impl = None
        centers = {name: p.detach() for name, p in trainable.items()}
        yield centers, {name: stand_in(p) for name, p in trainable.items()}
    finally:
        for module, implementation in compiled.items():
            module._compiled_call_impl = implementation
        for module, forward in wrapped.items():
            module.__dict__["forward"] = forward
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module, name, p in parameters:
            setattr(module, name, p)
        for module, training in zip(modules, modes, strict=True):
            module.training = training


def refuse_sharded(model: nn.Module) -> None:
    """Raise ShardingError if this process has only a shard of a parameter."""
    for name, p in unwrapped(model).named_parameters():
        if hasattr(p, "placements"):
            kind = f"a DTensor with placements {tuple(p.placements)}"
        elif getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False):
            kind = "an FSDP1 shard"
        elif hasattr(p, "ds_id"):
            kind = "partitioned by DeepSpeed ZeRO-3"
        else:
            continue
        raise ShardingError(
            "sharpness: save the whole model and measure the checkpoint (python -m hf_lamb.sharpness), or train with "
            f"DDP: parameter {name} is {kind}, which cannot be perturbed in place"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _to(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; dtypes stay the same."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_to(value, device) for value in batch)
    return batch


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
