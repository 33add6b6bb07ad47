"""Lamb: the options, the state, and a `step` that reads as the paper's update."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from hf_lamb import fsdp1, norms, zero
from hf_lamb.backends import Bucket, Sums, cpu, eager, foreach
from hf_lamb.backends.bucket import math_dtype
from hf_lamb.options import check_options, python_numbers
from hf_lamb.segments import Layout, check_layouts
from hf_lamb.state import check_order, check_state, check_state_dict

__all__ = ["Lamb", "LayerStats", "SkippedSteps"]


class LayerStats(NamedTuple):
    """One parameter at the last step: ‖w‖ before it, ‖u‖, and the trust ratio that was applied."""

    weight_norm: float
    adam_norm: float
    trust_ratio: float


Slot = tuple[int, int, int]  # a layer's group, the place there of the tensor that holds it, and its place in that
# The layers that are sharded over the same process groups, in the same order on every process; and their arithmetic.
Sharded = dict[norms.Reductions, dict[Slot, torch.dtype]]


class SkippedSteps(NamedTuple):
    """Steps that changed nothing because a gradient was not finite."""

    total: int
    in_a_row: int


class Lamb(Optimizer):
    """LAMB: AdamW whose step on each layer is rescaled to a fixed fraction of the layer's norm.

    For every parameter tensor w with gradient g, at its step t = 1, 2, ...::

        m = beta1*m + (1 - beta1)*g          v = beta2*v + (1 - beta2)*g*g
        m̂ = m / (1 - beta1**t)               v̂ = v / (1 - beta2**t)
        u = m̂ / (sqrt(v̂) + eps) + weight_decay*w
        r = ‖w‖ / ‖u‖  if both norms are positive, else 1
        w = w - lr*r*u

    A layer whose g and m are exactly zero keeps its weights: u would be its decay alone, which the trust ratio would
    make a step of the share lr of the weights. Its step counts all the same. (Without `layer_adaptation` it decays.)

    The arithmetic and the state are float32 for bf16, fp16 and fp32 parameters, float64 for float64 ones.
    Gradients are never written to, nothing is read back to the host, and `step` branches on no tensor's value.

    Every parameter given is adapted. Biases and normalisation weights are better left out of both decay and
    adaptation: pass `lamb_param_groups(model)` instead of `model.parameters()`.

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of parameter groups. Every option below can be set
            for a group.
        lr: learning rate, a float or a tensor of one element; relative to the norm of the weights, so about 50
            times AdamW's on BERT. Default 1e-3.
        betas: decay rates of the two moments. Default (0.9, 0.999).
        eps: added to sqrt(v̂). Default 1e-6.
        weight_decay: λ, inside the adapted update. Default 0.01.
        bias_correction: divide the moments by 1 - beta**t; off is the paper's v3. Default True.
        layer_adaptation: use the trust ratio; off (r = 1, no bounds) this is `torch.optim.AdamW`. Default True.
        min_trust_ratio, max_trust_ratio: bounds of r; `max_trust_ratio=10` is the paper's v1. Default none.
        max_grad_norm: scale all gradients so that their global norm is at most this, as apex's FusedLAMB does.
            Default none, because `transformers.Trainer` clips already.
        skip_nonfinite: leave weights, moments and step counts as they are when any gradient holds an inf or a NaN,
            or is so large that the sum of squares of all gradients overflows. Default True.
        maximize: maximise the objective. Default False.
        foreach: use torch's multi-tensor operations. Default: on accelerators.
        fused: use fused kernels, on CUDA those in Triton. Default: on CPU and CUDA, unless `foreach` is given. Before
            their first step on a GPU the Triton kernels must make of two small tensors what foreach does; where they
            do not, or do not run, there is a warning, and foreach is used. Tensors that the kernels do not take (not
            contiguous; on CUDA, float64; other accelerators') are updated as with `foreach=True`, and so are all
            under torch.compile.

    Raises:
        TypeError: what is given for `params` holds no parameters, as a model.
        ValueError: an option of another kind or out of range (the message holds the value); a parameter that is
            complex, integer, sparse, lazy or on the meta device.
        RuntimeError: `fused` and `foreach` both `True`; in `step`, a sparse gradient.
        hf_lamb.norms.ShardingError: in `step`, a parameter of which only a piece is here, with nothing to say where
            the rest is (FSDP1, DeepSpeed ZeRO). DTensors (FSDP2, tensor parallelism) are understood.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020,
    https://arxiv.org/abs/1904.00962, Algorithm 2 with φ = identity.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        layer_adaptation: bool = True,
        min_trust_ratio: float | None = None,
        max_trust_ratio: float | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "layer_adaptation": layer_adaptation,
            "min_trust_ratio": min_trust_ratio,
            "max_trust_ratio": max_trust_ratio,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        check_options(defaults)
        defaults |= python_numbers(defaults)
        _check_iterable(params)
        self._forget()
        self._shapes: set[torch.Size] = set()
        self._layouts: dict[Tensor, Layout] = {}  # of the tensors that say nothing of what they hold
        self._engine: Any = None  # DeepSpeed's
        self._zero: zero.Attached | None = None
        self._seen_by = _zero_redundancy_group()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Start the diagnostics anew; they live outside `state`, where norms make sharded checkpoints crash.

        In lists that `step` changes in place: torch.compile forgets what it sets on an optimizer.
        """
        self._layers: list[_Layers] = []
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._tables: dict[Slot, Any] = {}  # of a bucket, under the first of its parameters
        self._in_graphs: list[Any] = []  # tables that CUDA graphs read when they are replayed
        self._skipped: list[Tensor] = []  # [in all, in a row], int64, made at the first step that may skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or take over loaded groups; options that an older version did not have get their defaults."""
        super().__setstate__(state)
        self._forget()
        self.__dict__.setdefault("_seen_by", None)
        self.__dict__.setdefault("_layouts", {})
        self.__dict__.setdefault("_engine", None)
        self.__dict__.setdefault("_zero", None)
        self.__dict__.setdefault("_shapes", {param.shape for group in self.param_groups for param in group["params"]})
        for group in self.param_groups:
            for option in self.defaults.keys() - {"differentiable"}:  # torch's own, not one of ours
                group.setdefault(option, self.defaults[option])
            group.update(python_numbers(group))

    def __getstate__(self) -> dict[str, Any]:
        """A copy's tensors are others: it must be attached anew, and not take what was flattened for a layer."""
        state = super().__getstate__()
        if self._layouts:
            state["_shapes"] = self._shapes - {tensor.shape for tensor in self._layouts}
        return state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own, to those being optimised."""
        if isinstance(param_group, dict):
            if "params" not in param_group:
                has = ", ".join(map(str, param_group)) or "nothing"
                raise ValueError(f'Lamb: a parameter group has {has}, but no "params": put its parameters there')
            check_options({**self.defaults, **param_group})
            param_group.update(python_numbers(param_group))
            _check_iterable(param_group["params"])
        super().add_param_group(param_group)
        names, params = self.param_groups[-1].get("param_names"), self.param_groups[-1]["params"]
        if names is not None and len(names) != len(params):
            del self.param_groups[-1]
            raise ValueError(
                f"Lamb: a parameter group has {len(params)} parameters and {len(names)} param_names: leave out the "
                "same ones of both"
            )
        for index, param in enumerate(self.param_groups[-1]["params"]):
            kind = _unfit(param)
            if kind is not None:
                name = self.parameter_name(len(self.param_groups) - 1, index)
                del self.param_groups[-1]
                raise ValueError(f"Lamb: parameter {name} is {kind}")
        self._shapes.update(param.shape for param in self.param_groups[-1]["params"])

    def attach(self, model: Any = None, *, process_group: ProcessGroup | None = None) -> None:
        """Say where the layers lie of which this process has only a piece. All processes call it together.

        Call it once, after wrapping and before the first step. It does nothing where nothing is hidden (one process,
        DDP, FSDP2, tensor parallelism), so the line may stay. Under DeepSpeed the first step does it by itself; the
        line tells earlier what is not supported, and that accelerate has put CPU-Adam in LAMB's place.

        There, ZeRO-1 and 2 call `step` once for each parameter group, ZeRO-3 for each sub-group; together these are
        one step. `skip_nonfinite` and `max_grad_norm` go by the norm that DeepSpeed has computed of all gradients,
        after its own clipping: they decide for all calls alike and send nothing. A call sends the squared norms of its
        layers in one all-reduce. Steps that DeepSpeed skips are in its own count only, `engine.skipped_steps`.

        Args:
            model: what wraps the model: FSDP1's (`FullyShardedDataParallel`, or a module that has some inside), or the
                engine of `deepspeed.initialize`, which is also what `accelerator.prepare` returns for the model.
            process_group: the processes that hold other parameters of the same model, as the stages of a pipeline do.
                They then skip a step together when any of their gradients is not finite, and `max_grad_norm` clips the
                norm over all of them; the cost is one more all-reduce of one number a step. Trust ratios need no such
                word: each process has whole layers or DTensors. `torch.distributed.optim.ZeroRedundancyOptimizer` is
                noticed and attached without a call.

        Raises:
            ValueError: neither is given; what is given is no module.
            hf_lamb.norms.ShardingError: a layout that does not add up, or that this optimizer's parameters are not of.
        """
        if model is None and process_group is None:
            raise ValueError("Lamb.attach: got nothing: pass the wrapped model, or process_group=...")
        if process_group is not None:
            self._seen_by = norms.reduction_of(process_group, self._device())
        if zero.is_engine(model):
            self._attach_engine(model)
        elif model is not None:
            layouts = self._layouts_of(model)
            self._layouts.update(layouts)
            for group in self.param_groups:
                for param in group["params"]:
                    if param in layouts and param.requires_grad:
                        # Without any, accelerate 1.15 loads none from a sharded checkpoint, and says nothing.
                        self._state_of(param)

    def _attach_engine(self, engine: Any) -> None:
        layouts = zero.layouts(engine, self)
        check_layouts(layouts)
        self._engine, self._layouts = engine, layouts
        self._zero = zero.Attached(engine, next(iter(layouts))) if engine.zero_optimization() else None

    def _layouts_of(self, model: Any) -> dict[Tensor, Layout]:
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"Lamb.attach: expected the wrapped model, got {type(model).__name__}")
        layouts = fsdp1.layouts(model)
        check_layouts(layouts)
        params = {id(param) for group in self.param_groups for param in group["params"]}
        if layouts and not any(id(tensor) in params for tensor in layouts):
            raise norms.ShardingError(
                "Lamb.attach: FSDP1 has put flat tensors in the place of this optimizer's parameters, so it would "
                "train nothing: build Lamb(lamb_param_groups(model)) on the wrapped model, or set use_orig_params=True"
            )
        return layouts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, of this or an earlier version, as torch does, with three differences.

        Moments keep their precision: torch casts those of bf16 and fp16 parameters down to the parameters' dtype.
        `step` goes to the parameter's device. And state of another shape or, where both sides have names, of the
        same parameters in another order is refused instead of going to the wrong ones.

        Raises:
            ValueError: no optimizer's state dict; other groups, shapes or order than this optimizer's; options out of
                range; state of another optimizer (`convert_state_dict` takes that over). Nothing has been loaded then.
        """
        if not isinstance(state_dict, dict):
            check_state_dict(state_dict, "Lamb")
        given: dict[str, Any] = {}
        # As the last hook before and the first after, so that other hooks see and change what torch lets them.
        before = self.register_load_state_dict_pre_hook(lambda _, state: self._check_loadable(state, given))
        after = self.register_load_state_dict_post_hook(lambda _: self._restore_precision(given), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _check_loadable(self, state_dict: dict[str, Any], given: dict[str, Any]) -> None:
        check_state_dict(state_dict, "Lamb")
        given.update(state_dict)
        groups, loaded = self.param_groups, state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in loaded]:
            return  # torch has words for this
        for group_index, (group, other) in enumerate(zip(groups, loaded, strict=True)):
            check_order(group.get("param_names"), other.get("param_names"))
            if "amsgrad" in other:
                raise ValueError(
                    "Lamb: the state dict is an Adam's (its groups have amsgrad), whose lr is not LAMB's: "
                    "see hf_lamb.convert_state_dict"
                )
            check_options({**self.defaults, **other})
            for index, (param, key) in enumerate(zip(group["params"], other["params"], strict=True)):
                state = state_dict["state"].get(key, {})
                if not state:
                    continue
                name = self.parameter_name(group_index, index)
                if set(state) != {"step", "exp_avg", "exp_avg_sq"}:
                    raise ValueError(
                        f"Lamb: the state of {name} has {', '.join(map(str, state))}, so it is another optimizer's: "
                        "see hf_lamb.convert_state_dict"
                    )
                check_state(state, param, "Lamb", name)

    def _restore_precision(self, given: dict[str, Any]) -> None:
        for group, other in zip(self.param_groups, given["param_groups"], strict=True):
            for param, key in zip(group["params"], other["params"], strict=True):
                state = given["state"].get(key)
                if state:
                    step = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)
                    self.state[param]["step"] = step.reshape(())
                    for moment in ("exp_avg", "exp_avg_sq"):
                        self.state[param][moment] = state[moment].to(param.device, math_dtype(param))
        self._forget()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one update of all parameters that have a gradient; without gradients, nothing.

        `closure` re-evaluates the model and returns the loss, which is passed on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        engine = zero.calling_engine()
        if engine is not None and zero.is_trial_step(engine):
            return loss
        if engine is not None and engine is not self._engine:
            self.attach(engine)
        starts = self._zero is None or self._zero.starts(self.param_groups)

        buckets, sharded = self._collect()
        if not buckets and not sharded and self._seen_by is None:
            return loss
        self._look_at_gradients(buckets, sharded, starts)

        if starts:
            self._layers.clear()
        for together, across in self._rounds(buckets, sharded):
            directions = [_backend(bucket).direction(bucket) for bucket in together]
            sums = _sum_over_shards(together, [sums for sums, _ in directions], across)
            for bucket, of_layers, (_, held) in zip(together, sums, directions, strict=True):
                layers = _layers(bucket, of_layers)
                _backend(bucket).apply(bucket, held, _step_sizes(bucket, layers.trust_ratio))
                self._layers.append(layers)
        return loss

    def _rounds(self, buckets: list[Bucket], sharded: Sharded) -> Iterator[tuple[list[Bucket], Sharded]]:
        """What is updated together: all that is sharded, for one sum; the rest in parts, each while in the cache."""
        for bucket in buckets:
            backend = _backend(bucket)
            if backend is cpu:
                bucket.scratch = self._scratch_for(bucket)
            if hasattr(backend, "table_of"):
                bucket.table = self._table_for(bucket, backend)
            if not bucket.reductions:
                for part in bucket.parts(backend.PART) if hasattr(backend, "PART") else [bucket]:
                    yield [part], {}
        if sharded:
            yield [bucket for bucket in buckets if bucket.reductions], sharded

    def _scratch_for(self, bucket: Bucket) -> Tensor:
        scratch = self._scratch.get(bucket.math_dtype)
        if scratch is None or scratch.numel() < cpu.scratch_size(bucket):
            scratch = torch.empty(cpu.scratch_size(bucket), dtype=bucket.math_dtype)
            self._scratch[bucket.math_dtype] = scratch
        return scratch

    def _table_for(self, bucket: Bucket, backend: Any) -> Any:
        table = backend.table_of(bucket, self._tables.get(bucket.slots[0]))
        if bucket.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._in_graphs.append(table)
        else:
            self._tables[bucket.slots[0]] = table
        return table

    def layer_stats(self, adapted_only: bool = False) -> dict[str, LayerStats]:
        """What the last `step` saw and did, by parameter name: `{name: LayerStats}`.

        `adapted_only` leaves out the parameters of groups without `layer_adaptation`, whose trust ratio is 1. A layer
        that kept its weights is not there either, whether it had no gradient, or zeros and nothing in m.

        Names are those the parameters were given with (`lamb_param_groups`, `model.named_parameters()`), else
        `param_groups.I.params.J`. Reading waits for the device once; `step` itself does not. Empty before the
        first step, after loading and after unpickling.
        """
        stats: dict[str, LayerStats] = {}
        for layers in self._layers:
            if adapted_only and not layers.adapted:
                continue
            columns = (layers.weight_norm, layers.adam_norm, layers.trust_ratio, layers.moved)
            table = torch.stack(columns, dim=1).tolist()
            rows = zip(layers.names, table, strict=True)
            stats.update((name, LayerStats(*row)) for name, (*row, moved) in rows if moved)
        return stats

    def skipped_steps(self) -> SkippedSteps:
        """How many steps non-finite gradients have cost, `(total, in_a_row)`, since construction or loading.

        Reading waits for the device; `step` itself does not.
        """
        return SkippedSteps(*self._skipped[0].tolist()) if self._skipped else SkippedSteps(0, 0)

    def _look_at_gradients(self, buckets: list[Bucket], sharded: Sharded, starts: bool) -> None:
        """Decide for all parameters of all processes, from one sum of squares: whether to skip, how much to clip."""
        skips = any(group["skip_nonfinite"] for group in self.param_groups)
        if not skips and all(group["max_grad_norm"] is None for group in self.param_groups):
            return
        device = buckets[0].device if buckets else self._device()
        norm_sq = self._zero.norm_sq(device) if self._zero else self._gradient_norm_sq(buckets, sharded, device)

        finite = norm_sq.isfinite()
        if skips and starts:
            self._count_skipped(finite)
        for bucket in buckets:
            if bucket.group["skip_nonfinite"]:
                bucket.finite = finite.to(bucket.device)
            max_grad_norm = bucket.group["max_grad_norm"]
            if max_grad_norm is not None:
                factor = 1 / (norm_sq.sqrt() / max_grad_norm).clamp(min=1)
                bucket.clip_factor = factor.to(bucket.device, bucket.math_dtype)

    def _gradient_norm_sq(self, buckets: list[Bucket], sharded: Sharded, device: torch.device) -> Tensor:
        sums = {r: torch.zeros(1, device=device, dtype=_common(slots)) for r, slots in sharded.items()}
        sums[()] = torch.zeros(1, device=device)
        for bucket in buckets:
            squared = norms.squared_norms(bucket.grads).sum().to(device)
            sums[bucket.reductions] = sums[bucket.reductions] + squared.reshape(1)  # 0-dim, it would not promote
        norm_sq = torch.cat(list(norms.sum_over_processes(sums).values())).sum()
        if self._seen_by is not None:
            # In one dtype whatever this process has: others have other parameters.
            norm_sq = norms.sum_over_processes({(self._seen_by,): norm_sq.double()})[(self._seen_by,)]
        return norm_sq

    def _device(self) -> torch.device:
        """Of the first parameter; ZeroRedundancyOptimizer may leave a process without any."""
        params = (param for group in self.param_groups for param in group["params"])
        return next((param.device for param in params), torch.device("cpu"))

    def _count_skipped(self, finite: Tensor) -> None:
        if not self._skipped:
            self._skipped.append(torch.zeros(2, dtype=torch.int64, device=finite.device))
        total, in_a_row = self._skipped[0]
        skipped = finite.logical_not().long()
        self._skipped[0].copy_(torch.stack((total + skipped, (in_a_row + 1) * skipped)))

    def parameter_name(self, group_index: int, index: int) -> str:
        """The name a parameter was given with, else where it is: `param_groups.I.params.J`."""
        names = self.param_groups[group_index].get("param_names")
        return names[index] if names else f"param_groups.{group_index}.params.{index}"

    def _collect(self) -> tuple[list[Bucket], Sharded]:
        """The local tensors that have a gradient, in buckets; and which layers are sharded over which groups.

        All sharded layers, with a gradient here or not, so that all processes speak of the same ones.
        """
        buckets: dict[Any, Bucket] = {}
        sharded: Sharded = {}
        for group_index, group in enumerate(self.param_groups):
            options = {**group, **python_numbers(group)}  # schedules of other people's write there
            for index, param in enumerate(group["params"]):
                layout = self._layouts.get(param) if self._layouts else None
                if layout is not None:
                    self._collect_segments(buckets, sharded, options, group_index, index, layout)
                    continue
                name = self.parameter_name(group_index, index)
                if param.shape not in self._shapes:
                    raise norms.ShardingError(
                        f"Lamb: parameter {name} has shape {tuple(param.shape)}, which this optimizer was not built "
                        "with: under DeepSpeed ZeRO call optimizer.attach(engine) after deepspeed.initialize; for a "
                        "resized layer build a new optimizer"
                    )
                local, reductions = norms.local_shard(param, name)
                slot = (group_index, index, 0)
                if reductions:
                    sharded.setdefault(reductions, {})[slot] = math_dtype(local)
                if param.grad is None:
                    continue
                _refuse_sparse(param.grad, name)
                grad = norms.local_grad(param, param.grad)
                state = self._state_of(param)
                exp_avg = norms.local_shard(state["exp_avg"], name)[0]
                exp_avg_sq = norms.local_shard(state["exp_avg_sq"], name)[0]
                if not local.shape == grad.shape == exp_avg.shape == exp_avg_sq.shape:
                    raise norms.ShardingError(
                        f"Lamb: parameter {name} has shape {tuple(local.shape)} here, its gradient "
                        f"{tuple(grad.shape)} and its moments {tuple(exp_avg.shape)}: for a resized layer build "
                        "a new optimizer"
                    )
                contiguous = all(tensor.is_contiguous() for tensor in (local, grad, exp_avg, exp_avg_sq))
                key = (group_index, local.device, local.dtype, grad.dtype, reductions, contiguous)
                bucket = buckets.setdefault(key, Bucket(options, reductions, contiguous))
                bucket.add(name, slot, local, grad, exp_avg, exp_avg_sq, state["step"])
        return list(buckets.values()), sharded

    def _collect_segments(
        self,
        buckets: dict[Any, Bucket],
        sharded: Sharded,
        group: dict[str, Any],
        group_index: int,
        index: int,
        layout: Layout,
    ) -> None:
        """The same for a tensor that holds parts of layers: each is an entry of its own, on every process."""
        param = group["params"][index]
        if param.numel() != layout.numel:
            raise norms.ShardingError(
                f"Lamb: {self.parameter_name(group_index, index)} has {param.numel()} elements here and had "
                f"{layout.numel} in attach: call step outside of summon_full_params, and attach again after resharding"
            )
        if layout.reductions:
            slots = sharded.setdefault(layout.reductions, {})
            slots.update(((group_index, index, i), math_dtype(param)) for i in range(len(layout.segments)))
        grad = param.grad
        if grad is not None:
            _refuse_sparse(grad, layout.segments[0].name)
            state = self._state_of(param)
        elif param.numel() == 0 and param.requires_grad and layout.reductions:
            # The others have the layer, and FSDP1 says nothing of it here: the same statistics on all processes.
            grad = param.detach()
            step = torch.zeros((), dtype=torch.float32, device=param.device)
            state = {"step": step, "exp_avg": grad.to(math_dtype(param)), "exp_avg_sq": grad.to(math_dtype(param))}
        else:
            return
        # One step counts for all of the tensor: the first segment advances it, the others copies.
        steps = [state["step"], *state["step"].repeat(len(layout.segments) - 1).unbind()]
        tensors = (param, grad, state["exp_avg"], state["exp_avg_sq"])
        contiguous = all(tensor.is_contiguous() for tensor in tensors)
        undecayed, unadapted = set(group.get("undecayed", ())), set(group.get("unadapted", ()))
        w, g, m, v = (layout.pieces(tensor) for tensor in tensors)
        for i, segment in enumerate(layout.segments):
            decays, adapts = segment.name not in undecayed, segment.name not in unadapted
            key = (group_index, decays, adapts, param.device, param.dtype, grad.dtype, layout.reductions, contiguous)
            bucket = buckets.get(key)
            if bucket is None:
                own = group if decays else {**group, "weight_decay": 0.0}
                own = own if adapts else {**own, "layer_adaptation": False}
                bucket = buckets[key] = Bucket(own, layout.reductions, contiguous)
            bucket.add(segment.name, (group_index, index, i), w[i], g[i], m[i], v[i], steps[i])

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            # On the parameter's device, so that a step needs no host sync and can be captured in a CUDA graph.
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=math_dtype(param))
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=math_dtype(param))
        elif state["exp_avg"].dtype != math_dtype(param) or state["exp_avg"].device != param.device:
            # Somebody has cast the model, or moved it to another device, since the last step.
            state["step"] = state["step"].to(param.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = state[moment].to(param.device, math_dtype(param))
        return state


class _Layers(NamedTuple):
    """The norms and ratios of a bucket's parameters, as tensors of shape [n] on its device."""

    names: list[str]
    adapted: bool
    weight_norm: Tensor
    adam_norm: Tensor
    trust_ratio: Tensor
    moved: Tensor  # 0 where the layer kept its weights, for there was neither a gradient nor a first moment, else 1


def _check_iterable(params: Any) -> None:
    """Refuse what is given in the place of parameters, where torch's words name neither it nor the way out."""
    module = isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList)
    if module or isinstance(params, dict) or not isinstance(params, (Tensor, Iterable)):
        group = isinstance(params, dict) and "params" in params
        raise TypeError(
            f"Lamb: expected parameters or groups of them, got {type(params).__name__}: "
            f"pass {'a list of such dicts' if group else 'lamb_param_groups(model) or model.parameters()'}"
        )


def _unfit(param: Tensor) -> str | None:
    """Why LAMB can't train a parameter, and what to do."""
    if isinstance(param, torch.nn.parameter.UninitializedParameter):
        return "not initialised yet (a lazy module's): run the model on a batch before you build the optimizer"
    if param.layout != torch.strided:
        return f"of layout {param.layout}, which LAMB's norms do not support: make it dense, with .to_dense()"
    if param.is_floating_point() and not param.is_meta:
        return None
    kind = "on the meta device" if param.is_meta else f"of dtype {param.dtype}"
    return f"{kind}: it takes real floating-point tensors that hold data"


def _refuse_sparse(grad: Tensor, name: str) -> None:
    if grad.is_sparse:
        raise RuntimeError(
            f"Lamb: the gradient of {name} is sparse, which LAMB's norms do not support: "
            "use sparse=False in the embedding"
        )


def _sum_over_shards(buckets: list[Bucket], sums: list[Sums], sharded: Sharded) -> list[Sums]:
    """The sums of whole layers from those of the local shards; a layer without a gradient here adds nothing."""
    if not sharded:
        return sums
    local = {
        slot: of_layer
        for bucket, here in zip(buckets, sums, strict=True)
        if bucket.reductions
        for slot, of_layer in zip(bucket.slots, torch.stack(here, dim=1), strict=True)
    }
    device = next(bucket.device for bucket in buckets if bucket.reductions) if local else None
    parts = {}
    for reductions, slots in sharded.items():
        nothing = torch.zeros(len(Sums._fields), device=device, dtype=_common(slots))
        parts[reductions] = torch.stack([local.get(slot, nothing).to(nothing) for slot in slots])
    whole = {
        slot: of_layer
        for reductions, summed in norms.sum_over_processes(parts).items()
        for slot, of_layer in zip(sharded[reductions], summed, strict=True)
    }
    return [
        Sums(*torch.stack([whole[slot] for slot in bucket.slots], dim=1).to(here.weight_sq))
        if bucket.reductions
        else here
        for bucket, here in zip(buckets, sums, strict=True)
    ]


def _common(slots: dict[Slot, torch.dtype]) -> torch.dtype:
    """The dtype in which processes speak of these layers, whether or not they have gradients of them."""
    return torch.float64 if torch.float64 in slots.values() else torch.float32


def _zero_redundancy_group() -> norms.Reduction | None:
    """The group of the ZeroRedundancyOptimizer that is constructing this optimizer, if one is.

    It gives each process's optimizer some of the parameters and says nothing, but a step must be skipped by all.
    """
    module = sys.modules.get("torch.distributed.optim")
    if module is None:
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.ZeroRedundancyOptimizer):
            return norms.reduction_of(caller.process_group, caller.param_groups[0]["params"][0].device)
        frame = frame.f_back
    return None


def _layers(bucket: Bucket, sums: Sums) -> _Layers:
    group, weight_norm, adam_norm = bucket.group, sums.weight_sq.sqrt(), sums.update_sq.sqrt()
    if group["layer_adaptation"]:
        moved = sums.nonzero > 0
        ratio = norms.trust_ratio(weight_norm, adam_norm, group["min_trust_ratio"], group["max_trust_ratio"])
        ratio = torch.where(moved, ratio, 0.0)
    else:
        moved, ratio = sums.update_sq != 0, torch.ones_like(weight_norm)
    return _Layers(bucket.names, group["layer_adaptation"], weight_norm, adam_norm, ratio, moved.to(ratio))


def _step_sizes(bucket: Bucket, trust_ratio: Tensor) -> Tensor:
    """lr * r of each parameter, shape [n]; zero where this step is skipped."""
    lr = bucket.group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())  # a one-element tensor would broadcast as well, but a 0-dim one may live on the CPU
        if lr.device.type != "cpu":
            lr = lr.to(trust_ratio.device)  # some parameters may be elsewhere
    step_sizes: Tensor = lr * trust_ratio
    return step_sizes if bucket.finite is None else step_sizes * bucket.finite


def _backend(bucket: Bucket) -> Any:
    use_foreach, use_fused = bucket.group["foreach"], bucket.group["fused"]
    if use_fused or (use_fused is None and use_foreach is None):
        # torch.compile makes its own kernels, from operations that it can see into.
        fused = None if torch.compiler.is_compiling() else _fused(bucket.device)
        return fused if fused is not None and fused.takes(bucket) else foreach
    if use_foreach is None:
        use_foreach = bucket.device.type != "cpu"
    return foreach if use_foreach else eager


def _fused(device: torch.device) -> Any:
    """The fused backend for a kind of device, if there is one."""
    if device.type == "cpu":
        return cpu
    return _triton(device) if device.type == "cuda" and torch.version.hip is None else None


@functools.cache
def _triton(device: torch.device) -> Any:
    """The backend that needs Triton, imported for a device's first parameter; None where it cannot be used there."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Lamb: a CUDA graph is being captured, but no step on this device came before it: call step() once "
            "outside of each capture, as torch.cuda.graph's warm-up does"
        )
    try:
        from hf_lamb.backends import triton

        triton.check(device)
    except ImportError:
        return None
    except Exception as error:  # it compiles a C file here: no compiler, no Python.h, a full disk, ...
        warnings.warn(f"Lamb: no fused kernels on {device}, but foreach: {error}", stacklevel=2)
        return None
    return triton
