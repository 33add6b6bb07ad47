"""Lamb: the options, the state, and a `step` that reads as the paper's update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from hf_lamb.backends import Backend, Backends, Bucket
from hf_lamb.layer_stats import BucketStats, LayerStats, SkippedSteps, count_skipped, layer_stats
from hf_lamb.norms import math_dtype
from hf_lamb.options import check_iterable, check_options, check_params, name_in_group, python_numbers
from hf_lamb.packing import Packing
from hf_lamb.sharding import Sharding, device_of
from hf_lamb.state import check_loadable, check_state_dict, restore_precision

__all__ = ["Lamb", "LayerStats", "SkippedSteps"]


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
        ValueError: an option of another kind or out of range (the message holds the value); a parameter that is
            complex, integer, sparse, lazy or on the meta device.
        TypeError: what is given for `params` holds no parameters, as a model.
        RuntimeError: `fused` and `foreach` both `True`; in `step`, a sparse gradient.
        hf_lamb.ShardingError: in `step`, a parameter of which only a piece is here, with nothing to say where
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
        check_iterable(params)
        self._sharding = Sharding()
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """Start diagnostics and backends anew.

        The diagnostics are not in `state`, where norms make sharded checkpoints crash. They are lists that `step`
        changes in place, because torch.compile forgets what it sets on an optimizer.
        """
        self._stats: list[BucketStats] = []
        self._skipped: list[Tensor] = []  # [in all, in a row], int64, made at the first step that may skip
        self._backends = Backends()
        self._packing = Packing()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or take over loaded groups; options that an older version did not have get their defaults."""
        super().__setstate__(state)
        self._reset()
        shapes = self.__dict__.pop("_shapes", None)
        if "_sharding" not in self.__dict__:
            params = (param for group in self.param_groups for param in group["params"])
            self._sharding = Sharding({param.shape for param in params} if shapes is None else shapes)
        for group in self.param_groups:
            for option in self.defaults.keys() - {"differentiable"}:  # torch's own, not one of ours
                group.setdefault(option, self.defaults[option])
            group.update(python_numbers(group))

    def __getstate__(self) -> dict[str, Any]:
        """Without the sharding: a copy's tensors are others, so the copy must be attached anew."""
        return {**super().__getstate__(), "_shapes": self._sharding.shapes_of_a_copy()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own, to those being optimised."""
        if isinstance(param_group, dict):
            if "params" not in param_group:
                has = ", ".join(map(str, param_group)) or "nothing"
                raise ValueError(f'Lamb: a parameter group has {has}, but no "params": put its parameters there')
            check_options({**self.defaults, **param_group})
            param_group.update(python_numbers(param_group))
            check_iterable(param_group["params"])
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            check_params(params, self.param_groups[-1].get("param_names"), len(self.param_groups) - 1)
        except ValueError:
            del self.param_groups[-1]
            raise
        self._sharding.shapes.update(param.shape for param in params)

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
            hf_lamb.ShardingError: a layout that does not add up, or that this optimizer's parameters are not of.
        """
        if model is None and process_group is None:
            raise ValueError("Lamb.attach: got nothing: pass the wrapped model, or process_group=...")
        for param in self._sharding.attach(self, model, process_group):
            self._state_of(param)

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

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            check_loadable(loaded, self.param_groups, self.defaults, self.parameter_name)
            given.update(loaded)

        def restore(_: Optimizer) -> None:
            restore_precision(self.state, self.param_groups, given)
            self._reset()

        # As the last hook before and the first after, so that other hooks see and change what torch lets them.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

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

        begins = self._sharding.begin_step(self)
        if begins is None:
            return loss
        buckets = self._packing.buckets(
            self.param_groups, self.state, self._sharding, self.parameter_name, self._state_of
        )
        if not buckets and not self._sharding.takes_part:
            return loss
        work = [(bucket, self._backends.choose(bucket)) for bucket in buckets]
        self._clip_and_detect_nonfinite(work, begins)

        if begins:
            self._stats.clear()
        whole = [(bucket, backend) for bucket, backend in work if bucket.cut is None]
        cut = [(bucket, backend) for bucket, backend in work if bucket.cut is not None]
        for bucket, backend in whole:
            # u = m̂/(√v̂ + ε) + λw; r = ‖w‖/‖u‖; w = w - ηru
            self._stats.append(BucketStats(bucket.names, bucket.group, backend.update(bucket)))
        if self._sharding.cuts:
            # The same in two visits. In between, the processes add up the sums of their pieces.
            visits = [backend.direction(bucket) for bucket, backend in cut]
            sums = self._sharding.add_up([bucket for bucket, _ in cut], [sums for sums, _ in visits])
            for (bucket, backend), (_, held), of_layers in zip(cut, visits, sums, strict=True):
                backend.apply(bucket, held, bucket.step_sizes(of_layers))
                self._stats.append(BucketStats(bucket.names, bucket.group, of_layers))
        for bucket in buckets:
            bucket.grads.clear()  # zero_grad(set_to_none=True) is to free them
        return loss

    def layer_stats(self, adapted_only: bool = False) -> dict[str, LayerStats]:
        """What the last `step` saw and did, by parameter name: `{name: LayerStats}`.

        `adapted_only` leaves out the parameters of groups without `layer_adaptation`, whose trust ratio is 1. A layer
        that kept its weights is not there either, whether it had no gradient, or zeros and nothing in m.

        Names are those the parameters were given with (`lamb_param_groups`, `model.named_parameters()`), else
        `param_groups.I.params.J`. Reading waits for the device once; `step` itself does not. Empty before the
        first step, after loading and after unpickling.
        """
        return layer_stats(self._stats, adapted_only)

    def skipped_steps(self) -> SkippedSteps:
        """How many steps non-finite gradients have cost, `(total, in_a_row)`, since construction or loading.

        Reading waits for the device; `step` itself does not.
        """
        return SkippedSteps(*self._skipped[0].tolist()) if self._skipped else SkippedSteps(0, 0)

    def _clip_and_detect_nonfinite(self, work: list[tuple[Bucket, Backend]], begins: bool) -> None:
        """Decide for all parameters of all processes, from one sum of squares: whether to skip, how much to clip."""
        skips = any(group["skip_nonfinite"] for group in self.param_groups)
        if not skips and all(group["max_grad_norm"] is None for group in self.param_groups):
            return
        buckets = [bucket for bucket, _ in work]
        params = buckets[0].params if buckets else [param for group in self.param_groups for param in group["params"]]
        norm_sq = self._sharding.gradient_norm_sq(
            buckets, lambda n: work[n][1].squared_gradients(work[n][0]), device_of(params)
        )
        finite = norm_sq < torch.inf  # one operation, where isfinite is several
        if skips and begins:
            count_skipped(self._skipped, finite)
        factors: dict[float, Tensor] = {}
        for bucket in buckets:
            if bucket.group["skip_nonfinite"]:
                bucket.finite = finite.to(bucket.device)
            max_grad_norm = bucket.group["max_grad_norm"]
            if max_grad_norm is not None:
                if max_grad_norm not in factors:
                    factors[max_grad_norm] = 1 / (norm_sq.sqrt() / max_grad_norm).clamp(min=1)
                bucket.clip_factor = factors[max_grad_norm].to(bucket.device, bucket.math_dtype)

    def parameter_name(self, group_index: int, index: int) -> str:
        """The name a parameter was given with, else where it is: `param_groups.I.params.J`."""
        return name_in_group(self.param_groups[group_index].get("param_names"), group_index, index)

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
