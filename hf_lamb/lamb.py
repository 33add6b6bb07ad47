"""The optimizer `Lamb`: its options, its state, and a `step` that follows the paper's update line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from hf_lamb.backends import Backend, Backends, Bucket
from hf_lamb.clipping import Look, skip_and_clip
from hf_lamb.fused_layers import check_split
from hf_lamb.layer_stats import BucketStats, LayerStats, SkippedSteps, count_skipped, layer_stats
from hf_lamb.options import (
    check_iterable,
    check_max_norm,
    check_options,
    check_params,
    name_in_group,
    python_numbers,
)
from hf_lamb.packing import Packing
from hf_lamb.sharding import Sharding, device_of
from hf_lamb.state import check_loadable, check_state_dict, restore_precision, state_of, warn_of_other_layers

__all__ = ["Lamb", "LayerStats", "SkippedSteps"]


class Lamb(Optimizer):
    """LAMB: AdamW whose step on each layer is rescaled to a fixed fraction of the layer's norm.

    For every parameter tensor w with gradient g, at its step t = 1, 2, ...:

        m = beta1*m + (1 - beta1)*g          v = beta2*v + (1 - beta2)*g*g
        m̂ = m / (1 - beta1**t)               v̂ = v / (1 - beta2**t)
        u = m̂ / (sqrt(v̂) + eps) + weight_decay*w
        r = ‖w‖ / ‖u‖  if both norms are positive, else 1
        w = w - lr*r*u

    A layer whose g and m are exactly zero keeps its weights. Its u would be weight decay alone, and the trust ratio
    would scale that to a full step of size lr*‖w‖. Its step count still grows. (Without `layer_adaptation` the layer
    decays.)

    The arithmetic and the state are float32 for bf16, fp16 and fp32 parameters, and float64 for float64 parameters.
    `step` never writes to a gradient, never synchronises with the device, and branches on no tensor's value.

    `Lamb` adapts every parameter it is given. Biases and normalisation weights should neither decay nor adapt, and
    fused parameters hold several layers: pass `lamb_param_groups(model)` instead of `model.parameters()`.

    Args:
        params: parameters, `(name, parameter)` pairs, or dicts of parameter groups. A group can set every option
            below for itself.
        lr: learning rate, a float or a tensor of one element. It is relative to the norm of the weights, so it
            is larger than AdamW's: five times on the small BERTs of docs/results.md. Default 1e-3.
        betas: decay rates of the two moments. Default (0.9, 0.999).
        eps: added to sqrt(v̂). Default 1e-6.
        weight_decay: λ, added inside u, so the trust ratio scales it too. Default 0.01.
        bias_correction: divide the moments by 1 - beta**t. False gives the paper's v3. Default True.
        layer_adaptation: use the trust ratio. False (r = 1, without bounds) gives `torch.optim.AdamW`. Default True.
        min_trust_ratio: lower bound of r. Default None.
        max_trust_ratio: upper bound of r; 10 is the paper's v1. Default None.
        fixed_norm: scale each layer that adapts back to the norm that it had before the step, so that only its
            direction changes: w = ‖w‖·(w - lr·r·u) / ‖w - lr·r·u‖ ("Hyperball", arXiv 2606.16899). A layer of zeros
            takes the plain step. Meant for hidden matrices: `lamb_param_groups(model, fixed_norm=True)`. Default
            False.
        max_grad_norm: scale all gradients so that their global norm is at most this, as apex's FusedLAMB does.
            Default None, because `transformers.Trainer` clips already.
        skip_nonfinite: skip the step when any gradient holds an inf or a NaN, or when the sum of squares of all
            gradients overflows. Weights, moments and step counts then stay as they are. Default True.
        maximize: maximise the objective. Default False.
        foreach: use torch's multi-tensor operations. Default: True on accelerators.
        fused: use fused kernels. Default: True on CPU and CUDA, unless `foreach` is given. On CUDA these are Triton
            kernels. Before the first step on a GPU, `Lamb` compares them with `foreach` on two small tensors. If they
            differ or do not run, it warns and uses `foreach`. On a CPU it is a C kernel. The first step compiles it
            with the system's compiler and keeps it in `$XDG_CACHE_HOME/hf_lamb`. Without a compiler, for float64, and
            with `HF_LAMB_NO_COMPILE=1` in the environment, `Lamb` uses torch's fused Adam kernel, block by block. It
            uses `foreach` for tensors that no kernel takes (non-contiguous ones, float64 on CUDA, other accelerators)
            and under torch.compile.

    Raises:
        ValueError: an option has the wrong type or is out of range (the message holds the value); a parameter is
            complex, integer, sparse, lazy or on the meta device.
        TypeError: `params` is not parameters or groups of them, but for example a model.
        RuntimeError: `fused` and `foreach` are both `True`; in `step`, a gradient is sparse.
        hf_lamb.ShardingError: in `step`, this process has only a shard of a parameter and cannot find out where the
            rest is (FSDP1 or DeepSpeed ZeRO without `attach`). DTensors (FSDP2, tensor parallelism) need no `attach`.

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
        fixed_norm: bool = False,
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
            "fixed_norm": fixed_norm,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        check_options(defaults)
        if fixed_norm and not layer_adaptation:
            raise ValueError(
                "Lamb: fixed_norm=True needs layer_adaptation=True, which is False: only layers that adapt keep norms"
            )
        defaults |= python_numbers(defaults)
        check_iterable(params)
        self._sharding = Sharding()
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """Reset the diagnostics and the backends.

        The diagnostics are not in `state`: norms in `state` make sharded checkpoints crash. `step` changes these lists
        in place, because torch.compile loses new attributes of an optimizer.
        """
        self._stats: list[BucketStats] = []
        self._skipped: list[Tensor] = []  # one int64 tensor [total, in a row], made at the first step that may skip
        self._backends = Backends()
        self._packing = Packing()
        self._looks: list[Look] = []  # none, or what `clip_grad_norm` left for the next step

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or loaded optimizer; options that an older version did not have get their defaults."""
        super().__setstate__(state)
        self._reset()
        shapes, had_peers = (self.__dict__.pop(name, None) for name in ("_shapes", "_had_peers"))
        if "_sharding" not in self.__dict__:
            params = (param for group in self.param_groups for param in group["params"])
            self._sharding = Sharding({param.shape for param in params} if shapes is None else shapes)
            self._sharding.had_peers = bool(had_peers)
        for option, parameter in signature(Lamb.__init__).parameters.items():
            if parameter.default is not parameter.empty:
                self.defaults.setdefault(option, parameter.default)  # a pickle brings the defaults of its version
        for group in self.param_groups:
            for option in self.defaults.keys() - {"differentiable"}:  # torch adds this one
                group.setdefault(option, self.defaults[option])
            group.update(python_numbers(group))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the sharding: a copy has other tensors, so the user must call `attach` on the copy."""
        sharding = self._sharding
        had_peers = sharding.had_peers or sharding.peer_group is not None
        return {**super().__getstate__(), "_shapes": sharding.shapes_of_a_copy(), "_had_peers": had_peers}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, which may have its own options.

        Raises:
            ValueError: the group has no "params", or an option or a parameter that `Lamb` does not take.
            TypeError: "params" is not parameters.
        """
        if isinstance(param_group, dict):
            if "params" not in param_group:
                has = ", ".join(map(str, param_group)) or "nothing"
                raise ValueError(f'Lamb: put the parameters of a group under "params": this one has only {has}')
            check_options({**self.defaults, **param_group})
            param_group.update(python_numbers(param_group))
            check_iterable(param_group["params"])
            if "split" in param_group:
                check_split(param_group["split"])
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            check_params(params, self.param_groups[-1].get("param_names"), len(self.param_groups) - 1)
        except ValueError:
            del self.param_groups[-1]
            raise
        self._sharding.shapes.update(param.shape for param in params)

    def attach(self, model: Any = None, *, process_group: ProcessGroup | None = None) -> None:
        """Find the layers of a wrapped model whose shards are on several processes. All processes must call it.

        Call it once, after wrapping and before the first step. FSDP1 needs it. With one process, DDP, FSDP2 and tensor
        parallelism it does nothing, so the line can stay in a script that runs with any of them. Under DeepSpeed the
        first step calls it. Call it yourself to get errors earlier: for a setup that is not supported, or because
        accelerate has replaced LAMB by CPU-Adam.

        DeepSpeed calls `step` several times for one optimizer step: ZeRO-1 and 2 once for each parameter group, ZeRO-3
        once for each sub-group. `skip_nonfinite` and `max_grad_norm` use the norm of all gradients that DeepSpeed
        computes, after DeepSpeed's own clipping; this needs no communication. Each call does one all-reduce, of the
        squared norms of its layers. Steps that DeepSpeed itself skips are counted in `engine.skipped_steps` only.

        Args:
            model: the wrapped model: a `FullyShardedDataParallel` (FSDP1), a module that contains some, or the engine
                that `deepspeed.initialize` returns, which `accelerator.prepare` returns too.
            process_group: processes that hold other parameters of the same model, such as the stages of a pipeline.
                They then skip a step together if a gradient of any of them is not finite, and `max_grad_norm` clips
                the norm over all of them. The cost is one more all-reduce of one number a step. Trust ratios do not
                need it, because each process has whole layers or DTensors. `Lamb` finds the group of a
                `torch.distributed.optim.ZeroRedundancyOptimizer` without this call.

        Raises:
            ValueError: neither argument is given, or `model` is not a module.
            hf_lamb.ShardingError: the shards do not add up to the layers, or this optimizer has other parameters.
        """
        if model is None and process_group is None:
            raise ValueError("Lamb.attach: pass the wrapped model, or process_group=...: got neither")
        for param in self._sharding.attach(self, model, process_group):
            state_of(self.state, param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this or an earlier version returned.

        Differences from torch's `load_state_dict`: moments keep their precision, where torch casts those of bf16 and
        fp16 parameters to the parameters' dtype; `step` moves to the parameter's device; a state dict is refused if
        shapes differ, or if both sides have names and the order of the parameters differs. It warns if other fused
        parameters are split than by this optimizer ("split" of `lamb_param_groups`): what the state dict says holds.

        Raises:
            ValueError: this is not an optimizer's state dict; its groups, shapes or order differ from this
                optimizer's; an option is out of range; it is another optimizer's (use `convert_state_dict`). Nothing
                has been loaded when this is raised.
        """
        if not isinstance(state_dict, dict):
            check_state_dict(state_dict, "Lamb")
        given: dict[str, Any] = {}

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            check_loadable(loaded, self.param_groups, self.defaults, self.parameter_name)
            given.update(loaded)
            if len(loaded["param_groups"]) == len(self.param_groups):
                warn_of_other_layers(self.param_groups, loaded["param_groups"])

        def restore(_: Optimizer) -> None:
            restore_precision(self.state, self.param_groups, given)
            self._reset()

        # The last hook before loading and the first one after it: other hooks then work as with torch's optimizers.
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
        """Update all parameters that have a gradient.

        Args:
            closure: re-evaluates the model and returns the loss. Default None.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse.
            hf_lamb.ShardingError: a parameter's layer cannot be put together, see `attach`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        look = self._looks.pop() if self._looks else None
        begins = self._sharding.begin_step(self)
        if begins is None:
            return loss
        work = self._work()
        buckets = [bucket for bucket, _ in work]
        if not buckets and not self._sharding.takes_part:
            return loss
        self._clip_and_detect_nonfinite(work, begins, look)

        if begins:
            self._stats.clear()
        whole = [(bucket, backend) for bucket, backend in work if bucket.cut is None]
        cut = [(bucket, backend) for bucket, backend in work if bucket.cut is not None]
        for bucket, backend in whole:
            # u = m̂/(√v̂ + ε) + λw; r = ‖w‖/‖u‖; w = w - ηru, which fixed_norm scales back to ‖w‖
            self._stats.append(BucketStats(bucket.names, bucket.group, backend.update(bucket)))
        if self._sharding.cuts:
            # The same in two visits. In between, the processes add up the sums of their pieces.
            visits = [backend.direction(bucket) for bucket, backend in cut]
            sums = self._sharding.add_up([bucket for bucket, _ in cut], [sums for sums, _ in visits])
            for (bucket, backend), (_, held), of_layers in zip(cut, visits, sums, strict=True):
                backend.apply(bucket, held, *backend.step_sizes(bucket, of_layers))
                self._stats.append(BucketStats(bucket.names, bucket.group, of_layers))
        for bucket in buckets:
            bucket.grads.clear()  # zero_grad(set_to_none=True) is to free them
        return loss

    def layer_stats(self, adapted_only: bool = False) -> dict[str, LayerStats]:
        """Return the norms and trust ratios of the last `step`, by parameter name.

        Synchronises with the device once. `step` never does.

        Args:
            adapted_only: leave out groups with `layer_adaptation=False`, whose trust ratio is 1. Default False.

        Returns:
            `{name: LayerStats}`. Names come from `lamb_param_groups` or `model.named_parameters()`; a parameter that
            was given without a name is `param_groups.I.params.J`. A layer that kept its weights is left out: it had no
            gradient, or its g and m were zero. The dict is empty before the first step, after loading and after
            unpickling.
        """
        return layer_stats(self._stats, adapted_only)

    def skipped_steps(self) -> SkippedSteps:
        """Return how many steps were skipped because of non-finite gradients, since construction or loading.

        Synchronises with the device once. `step` never does.

        Returns:
            `SkippedSteps(total, in_a_row)`.
        """
        return SkippedSteps(*self._skipped[0].tolist()) if self._skipped else SkippedSteps(0, 0)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Make the next `step` clip the gradients, and return their norm.

        The step then moves the weights as after `torch.nn.utils.clip_grad_norm_(params, max_norm)`, but nothing is
        written to the gradients, and `step` does not read them again for their norm. If a gradient was changed in
        between, `step` reads them again, and clips by the norm that it finds. (It does not see a change through
        `.data`, or by an all-reduce: it then clips by the norm from before.) Under fp16 unscale the gradients before.

        It holds for one step: the next `step` ends it, and so do `zero_grad` and `load_state_dict` of this optimizer.
        Checkpoints do not contain it. Where the option `max_grad_norm` is set too, it clips what is left.

        All processes must call it. It does not synchronise with the device.

        Args:
            max_norm: what the norm of all gradients of all processes shall be at most. With inf nothing is clipped;
                the step uses the norm for `skip_nonfinite` and `max_grad_norm`.

        Returns:
            The norm of all gradients of all processes, before clipping, as a 0-dim tensor; float32 unless parameters
            are float64.

        Raises:
            ValueError: `max_norm` is not a positive number.
            RuntimeError: a gradient is sparse.
            hf_lamb.ShardingError: a parameter's layer cannot be put together, see `attach`; DeepSpeed is used.
        """
        max_norm = check_max_norm(max_norm)
        self._sharding.check_clippable()
        self._looks.clear()
        work = self._work()
        squares = [backend.squared_gradients(bucket) for bucket, backend in work]
        buckets = [bucket for bucket, _ in work]
        norm_sq = self._gradient_norm_sq(work, squares)
        self._looks.append(Look(max_norm, self._gradients(), buckets, squares))
        for bucket in buckets:
            bucket.grads.clear()
        return norm_sq.sqrt()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as torch's optimizers do, and forget `clip_grad_norm`."""
        self._looks.clear()
        super().zero_grad(set_to_none)

    def _work(self) -> list[tuple[Bucket, Backend]]:
        """Return the pieces that have a gradient, in buckets, each with the backend that updates it."""
        buckets = self._packing.buckets(self.param_groups, self.state, self._sharding, self.parameter_name)
        return [(bucket, self._backends.choose(bucket)) for bucket in buckets]

    def _gradients(self) -> list[Tensor | None]:
        return [param.grad for group in self.param_groups for param in group["params"]]

    def _gradient_norm_sq(self, work: list[tuple[Bucket, Backend]], squares: Sequence[Tensor] | None) -> Tensor:
        """Return the squared norm of all gradients of all processes; `squares` are those of the buckets, if known."""
        buckets = [bucket for bucket, _ in work]
        params = buckets[0].params if buckets else [param for group in self.param_groups for param in group["params"]]

        def of_bucket(n: int) -> Tensor:
            bucket, backend = work[n]
            return backend.squared_gradients(bucket) if squares is None else squares[n]

        return self._sharding.gradient_norm_sq(buckets, of_bucket, device_of(params))

    def _clip_and_detect_nonfinite(self, work: list[tuple[Bucket, Backend]], begins: bool, look: Look | None) -> None:
        """Decide from the norm of all gradients of all processes whether to skip the step and how much to clip.

        With a look that still holds, no gradient is read. Each process decides that for its own pieces, and all of
        them add up their sums again: a callback may have written to a shard of one process only.
        """
        skips = any(group["skip_nonfinite"] for group in self.param_groups)
        max_norm = torch.inf if look is None else look.max_norm
        if not skips and max_norm == torch.inf and all(group["max_grad_norm"] is None for group in self.param_groups):
            return
        buckets = [bucket for bucket, _ in work]
        known = None if look is None else look.squares_of(self._gradients(), buckets)
        norm_sq = self._gradient_norm_sq(work, known)
        finite = norm_sq < torch.inf  # one operation, where isfinite is several
        if skips and begins:
            count_skipped(self._skipped, finite)
        skip_and_clip(buckets, norm_sq, finite, max_norm)

    def parameter_name(self, group_index: int, index: int) -> str:
        """Return the name that a parameter was given with, or its place `param_groups.I.params.J`."""
        return name_in_group(self.param_groups[group_index].get("param_names"), group_index, index)
