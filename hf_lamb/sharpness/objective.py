"""The loss as a function of the weights: L(y), ∇L(y) over fixed batches, at a copy y of a model's weights.

The model's own parameters are never written to. While an `Objective` is open the model computes with copies, which
are what the metrics move; afterwards its parameters, modes and buffers are the very objects they were. Memory: y and
∇L(y), two copies of the trainable weights.
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
    """What a loss function gives for a batch: its mean `loss` over `items`, and how many of them were right.

    items: what the mean is over (rows, or labelled tokens); a batch counts in the mean over batches by its items.
    correct: None where there is no right and wrong.
    """

    loss: Tensor
    items: Tensor | int = 1
    correct: Tensor | int | None = None


class Scores(NamedTuple):
    """Mean loss and accuracy over all items of all batches; accuracy is None where the loss function counts none."""

    loss: float
    accuracy: float | None


LossFn = Callable[[Any, Any], Tensor | BatchLoss]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> BatchLoss:
    """The mean cross-entropy, in nats, of `(inputs, classes)`: `model(inputs)` are logits [rows, classes]."""
    inputs, classes = batch
    logits = model(inputs)
    correct = (logits.argmax(dim=-1) == classes).sum()
    return BatchLoss(nn.functional.cross_entropy(logits, classes), classes.numel(), correct)


def labels_loss(model: nn.Module, batch: Mapping[str, Any]) -> BatchLoss:
    """The loss that a Hugging Face model gives for inputs with `labels`, a mean over the labels that are not -100.

    Accuracy where labels are classes, of causal language models too.

    Raises:
        ValueError: a batch that is no mapping with labels, or a model that gives no loss for it.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        what = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"a batch has no labels ({what}): give mappings with labels, or a loss_fn of your own")
    outputs = model(**batch)
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} gives no loss for these labels: pass a loss_fn of your own")
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
    """L and ∇L at `weights`, which start as copies of the model's trainable parameters and are there to be moved.

    Under DistributedDataParallel every process brings batches of its own, and all get the loss, the accuracy and the
    gradient over the batches of all.
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
        """(w, y) of every trainable tensor: where it was, in y's dtype, and where it is."""
        for name, y in self.weights.items():
            yield self.centers[name].to(y.dtype), y

    def gradient(self) -> float:
        """L(y); ∇L(y) is then in `y.grad`."""
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
        """L(y) and the accuracy there; `y.grad` is left alone."""
        with torch.no_grad():
            loss, accuracy, _ = self._total(None)
        return Scores(loss, accuracy)

    def value(self) -> float:
        """L(y); inf where it is not a number, so that it may stand in comparisons."""
        loss = self.scores().loss
        return math.inf if math.isnan(loss) else loss

    def hessian_times(self, v: Mapping[str, Tensor]) -> None:
        """Hv at y, into `y.grad`: the gradient of ∇L·v, by differentiating twice."""
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
        if loss.requires_grad:  # not where it does not depend on these weights, which then have the gradient zero
            loss.backward(inputs=list(self.weights.values()))  # type: ignore[no-untyped-call]

    def _total(self, visit: Callable[[Tensor], None] | None) -> tuple[float, float | None, float]:
        """(mean loss, accuracy, items) over all batches of all processes; `visit` sees each batch's summed loss."""
        _seed(0)  # a loss that draws random numbers is the same function every time
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, items, correct, batches that count it
        for batch in self.batches:
            given = self.loss_fn(self.model, _to(batch, self.device))
            loss, items, correct = given if isinstance(given, BatchLoss) else BatchLoss(given)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError(f"loss_fn gave {_shown(loss)} for a batch: expected the mean loss, one number")
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
            raise ValueError("the batches hold no label to compute a loss of: check them, and that they are not empty")
        return loss_sum / items_sum, right / items_sum if counted else None, items_sum


@contextmanager
def objective(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], group: ProcessGroup | None = None
) -> Iterator[Objective]:
    """The loss of a model over fixed batches as a function of its trainable weights, in eval mode and float32.

    batches: read once, whatever they come from, and then kept. float64 models stay float64. Autocast is off.
    group: processes that share the batches; by default those of a DistributedDataParallel model.

    On leaving, by an exception too, the model and all random number generators are as they were, bit for bit.

    Raises:
        ShardingError: FSDP, tensor-parallel or ZeRO-3 parameters.
        ValueError: no batches, no trainable parameters, a loss that is not finite to begin with.
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
    """The loss at the model's own weights; raises ValueError where there is none to compare with."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss at the given weights is {loss}: sharpness compares with it, so check the batches")
    return loss


def fixed_batches(
    dataset: Sequence[Any],
    batch_size: int,
    count: int | None = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    seed: int = 0,
) -> list[Any]:
    """`count` batches of rows that lie evenly over the dataset, collated once: masks drawn by `collate_fn` stay.

    count: None for as many as the dataset fills. The same seed gives the same batches; the global random number
    generators, and what `collate_fn` draws from them later, are not affected.

    Raises:
        ValueError: fewer rows than one batch.
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
    """Python's, NumPy's and torch's generators, of all devices in use, are on leaving what they were."""
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
    """The generators that `preserved_random_state` puts back; `torch.manual_seed` would seed CUDA for later, too."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@contextmanager
def _moved_to_copies(model: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, nn.Parameter]]]:
    """Let the model compute with copies of its parameters, in eval mode; put everything back on leaving.

    Yields (the trainable parameters as they are, the copies), by name. float16 and bfloat16 become float32 in the
    copies, and in frozen parameters and buffers for the time being.
    """
    refuse_sharded(model)
    names = {id(p): name for name, p in model.named_parameters()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to perturb")

    stand_ins: dict[int, nn.Parameter] = {}

    def stand_in(p: nn.Parameter) -> nn.Parameter:  # one for each parameter, however many modules share it
        if id(p) not in stand_ins:
            data = p.detach().to(_wide(p.dtype), copy=names[id(p)] in trainable)
            stand_ins[id(p)] = nn.Parameter(data, requires_grad=p.requires_grad)
        return stand_ins[id(p)]

    modules = list(model.modules())
    modes = [module.training for module in modules]
    parameters = [(m, n, p) for m in modules for n, p in m._parameters.items() if p is not None]
    buffers = [(m, n, b) for m in modules for n, b in m._buffers.items() if b is not None]
    # accelerate's mixed precision wraps `forward` in an autocast of its own and keeps the original beside it.
    wrapped = {m: m.__dict__["forward"] for m in modules if {"_original_forward", "forward"} <= vars(m).keys()}
    # Compiled for the original parameters, and not to be differentiated twice.
    compiled = {m: m._compiled_call_impl for m in modules if m._compiled_call_impl is not None}
    try:
        for module in modules:
            module.training = False
        for module, name, p in parameters:
            if p.is_floating_point():
                setattr(module, name, stand_in(p))  # setattr, because recurrent layers keep a list beside it
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
    """Raise ShardingError, with the name, for a parameter of which this process holds a part only."""
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
            f"sharpness: parameter {name} is {kind}, which cannot be perturbed in place: save the whole model and "
            "measure the checkpoint (python -m hf_lamb.sharpness), or train with DDP"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
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
    """The batch with its tensors on a device; floating-point ones keep their dtype."""
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
