"""Where the training state lives inside a DeepSpeed engine: every owned interval of every parameter.

The one idea: whatever the ZeRO stage, the master weights and the optimizer's states are flat tensors of the base
torch optimizer, and this rank holds an interval of each parameter's TP shard somewhere in them. `EngineState`
lists those intervals as views, so that saving a digest and placing a saved state are plain loops:

    state = EngineState(engine, names, layouts, context)
    for interval in state.intervals:
        interval.master.copy_(...)          # fp32, 1-D, a view into the optimizer's own tensor
        interval.states["exp_avg"].copy_(...)
    state.refresh_weights()                 # collective

This touches attributes of DeepSpeed 0.19.8 that are not public API; `_require` names what a new version lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from megatron.parallel.context import ParallelContext
from megatron.ucp.fragment import EMPTY, shard_runs
from megatron.ucp.layout import Layout, ShardRank

_STAGE3 = "DeepSpeedZeroOptimizer_Stage3"
_FLAT_GROUPS = {"DeepSpeedZeroOptimizer": "bit16_groups", "BF16_Optimizer": "bf16_groups"}
"""Wrappers that keep each group's weights in one flat tensor, and the attribute that lists its parameters."""


class UnsupportedOptimizerError(RuntimeError):
    """DeepSpeed wraps the optimizer in a way whose state this module does not know how to find."""


@dataclass(frozen=True)
class OwnedInterval:
    """Elements [start, start + numel) of a parameter's flattened TP shard, as held by this rank."""

    name: str
    """Canonical parameter name."""
    group: str
    """Name of the optimizer's parameter group."""
    param: torch.nn.Parameter
    flat: torch.Tensor
    """The base optimizer's own tensor: the key of its state."""
    flat_start: int
    start: int
    numel: int
    runs: Any
    """Where the interval lies in the atomic parameter: int64 [n, 3] (atomic_start, local_start, length)."""
    counted_runs: Any
    """Those runs that this rank counts in digests: another rank may hold the same elements and count them."""

    @property
    def master(self) -> torch.Tensor:
        return self.flat.detach().view(-1).narrow(0, self.flat_start, self.numel)

    def state(self, optimizer: torch.optim.Optimizer, key: str) -> torch.Tensor:
        return optimizer.state[self.flat][key].detach().view(-1).narrow(0, self.flat_start, self.numel)


@dataclass(frozen=True)
class _Fragment:
    param: torch.nn.Parameter
    flat: torch.Tensor
    flat_start: int
    start: int
    numel: int


class EngineState:
    """The optimizer's state of a live engine, by canonical parameter name. Construction is local."""

    def __init__(
        self,
        engine: Any,
        layouts: Mapping[str, Layout],
        context: ParallelContext,
        pp_stages: Mapping[str, tuple[int, ...]],
    ) -> None:
        """`layouts` and `pp_stages` (which stages hold a copy) cover every parameter of the whole model."""
        self.engine = engine
        self.layouts = layouts
        self.context = context
        self.pp_stages = pp_stages
        self.wrapper = type(engine.optimizer).__name__
        self.base: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self.shard_rank = ShardRank(tp_rank=context.tp_rank, tp_size=context.tp_size)

    @cached_property
    def is_replicated(self) -> bool:
        """True under ZeRO-0: every data-parallel rank holds all of the state."""
        return isinstance(self.engine.optimizer, torch.optim.Optimizer)

    @cached_property
    def intervals(self) -> tuple[OwnedInterval, ...]:
        return tuple(
            self._interval(fragment, self.base.param_groups[group]["name"]) for group, fragment in self._fragments()
        )

    def _interval(self, fragment: _Fragment, group: str) -> OwnedInterval:
        name = self.engine.param_names[fragment.param]
        layout = self.layouts[name]
        runs = shard_runs(layout, self.shard_rank, fragment.start, fragment.start + fragment.numel)
        context = self.context
        if context.pp_rank != min(self.pp_stages[name]) or (context.zero_rank > 0 and self.is_replicated):
            counted = EMPTY
        else:
            stop = fragment.start + fragment.numel
            counted = shard_runs(layout, self.shard_rank, fragment.start, stop, owned=True)
        return OwnedInterval(name, group, runs=runs, counted_runs=counted, **vars(fragment))

    @property
    def flats(self) -> list[tuple[int, torch.Tensor]]:
        """(parameter group, flat tensor): the keys of the base optimizer's state, in the order of its indices."""
        if self.wrapper == _STAGE3:
            # Between steps stage 3 takes them out of the optimizer's groups.
            optimizer = self.engine.optimizer
            _require(optimizer, "fp32_partitioned_groups_flat", "sub_group_to_group_id", "fp16_groups")
            return [
                (optimizer.sub_group_to_group_id[s], f) for s, f in enumerate(optimizer.fp32_partitioned_groups_flat)
            ]
        return [(index, flat) for index, group in enumerate(self.base.param_groups) for flat in group["params"]]

    def _fragments(self) -> Iterator[tuple[int, _Fragment]]:
        if self.is_replicated:
            yield from ((group, _Fragment(param, param, 0, 0, param.numel())) for group, param in self.flats)
        elif self.wrapper == _STAGE3:
            yield from self._stage3_fragments()
        elif self.wrapper in _FLAT_GROUPS:
            for group, flat in self.flats:
                yield from ((group, fragment) for fragment in self._flat_fragments(group, flat))
        else:
            raise UnsupportedOptimizerError(
                f"optimizer state under DeepSpeed's {self.wrapper} cannot be located; known are ZeRO-0 in fp32, "
                "ZeRO-1/2/3 and BF16_Optimizer. Choose --zero-stage 1 or 2."
            )

    def _flat_fragments(self, group: int, flat: torch.Tensor) -> Iterator[_Fragment]:
        """ZeRO-1/2: the group's shards one after the other, cut into one interval per data-parallel rank."""
        optimizer, attribute = self.engine.optimizer, _FLAT_GROUPS[self.wrapper]
        _require(optimizer, attribute, attribute + "_flat", "real_dp_process_group", "update_lp_params")
        weights_flat = getattr(optimizer, attribute + "_flat")[group]
        partition = flat.numel() * dist.get_rank(group=optimizer.real_dp_process_group[group])
        for param in getattr(optimizer, attribute)[group]:
            # The storage position is the truth: DeepSpeed's own hp mapping is wrong under round_robin_gradients.
            offset = (param.data_ptr() - weights_flat.data_ptr()) // weights_flat.element_size()
            begin = max(offset, partition)
            end = min(offset + param.numel(), partition + flat.numel())
            if end > begin:
                yield _Fragment(param, flat, begin - partition, begin - offset, end - begin)

    def _stage3_fragments(self) -> Iterator[tuple[int, _Fragment]]:
        """ZeRO-3: every parameter by itself in equal pieces, the last ones padded (with whatever was in memory)."""
        optimizer = self.engine.optimizer
        for (group, flat), params in zip(self.flats, optimizer.fp16_groups, strict=True):
            position = 0
            for param in params:
                length = param.partition_numel()
                start = min(dist.get_rank(group=param.ds_process_group) * length, param.ds_numel)
                stop = min(start + length, param.ds_numel)
                if stop > start:
                    yield group, _Fragment(param, flat, position, start, stop - start)
                position += length

    @property
    def stage3_order(self) -> list[list[str]]:
        """Names in each of ZeRO-3's sub-groups; empty under other stages."""
        if self.wrapper != _STAGE3:
            return []
        return [[self.engine.param_names[p] for p in params] for params in self.engine.optimizer.fp16_groups]

    @property
    def state_names(self) -> tuple[str, ...]:
        """The optimizer's tensor states cut like the parameter (exp_avg, ...), sorted; needs `make_states`."""
        names = {
            key
            for flat, states in self.base.state.items()
            for key, value in states.items()
            if torch.is_tensor(value) and value.dim() > 0 and value.shape == flat.shape
        }
        return tuple(sorted(names))

    def make_states(self) -> None:
        """Create the optimizer's states (zeros) where a fresh engine has none yet, without taking a step.

        The optimizer steps a one-element dummy, and what it leaves there is the template; so no table of
        optimizers is needed. The training that follows is bitwise the one without this call.
        """
        for group, flat in self.flats:
            template = self._state_template(group, flat)
            for key, value in template.items():
                if key not in self.base.state[flat]:
                    self.base.state[flat][key] = _zero_like(value, flat)
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            # So that DeepSpeed's own accessors (and its savers) see these tensors.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _state_template(self, group: int, flat: torch.Tensor) -> dict[str, Any]:
        dummy = torch.nn.Parameter(torch.zeros(1, dtype=flat.dtype, device=flat.device))
        dummy.grad = torch.zeros_like(dummy)
        groups = self.base.param_groups
        # A copy of the group: some optimizers write into it (FusedAdam's group["step"]).
        self.base.param_groups = [{**groups[group], "params": [dummy]}]
        try:
            type(self.base).step(self.base)  # the class's method: no hooks of schedulers or engines
        finally:
            self.base.param_groups = groups
        return self.base.state.pop(dummy, {})

    def step_of(self, flat: torch.Tensor) -> float | None:
        step = self.base.state[flat].get("step")
        return None if step is None else float(step)

    def set_step(self, flat: torch.Tensor, step: float) -> None:
        states = self.base.state[flat]
        if torch.is_tensor(states.get("step")):
            states["step"].fill_(step)
        elif "step" in states:
            states["step"] = type(states["step"])(step)

    def hyper_parameters(self) -> dict[str, dict[str, Any]]:
        """Every group's hyper-parameters by the group's name."""
        return {
            group["name"]: {key: _plain(value) for key, value in group.items() if key not in ("params", "name")}
            for group in self.base.param_groups
        }

    def set_hyper_parameters(self, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """In place and by name: group indices differ between topologies (a stage drops its empty groups)."""
        for group in self.base.param_groups:
            for key, value in groups[group["name"]].items():
                group[key] = tuple(value) if isinstance(value, list) else value

    def refresh_weights(self) -> None:
        """Make the live (low-precision) weights those of the masters. Collective over the data-parallel group."""
        optimizer = self.engine.optimizer
        if self.wrapper == _STAGE3:
            # Persisted parameters are whole between steps: in partitioned form first, gathered again after.
            optimizer.checkpoint_event_prologue()
            for (_, flat), params in zip(self.flats, optimizer.fp16_groups, strict=True):
                position = 0
                for param in params:
                    length = param.partition_numel()
                    param.ds_tensor.data.copy_(flat.data.narrow(0, position, length))
                    position += length
            optimizer.checkpoint_event_epilogue()
        elif not self.is_replicated:
            optimizer.update_lp_params()

    def stale_weights(self) -> list[str]:
        """Parameters whose live weights are not their masters, rounded: computing would go on with something else
        than what was placed. Local: this rank's own intervals."""
        return [
            interval.name
            for interval in self.intervals
            if not torch.equal(self._live(interval), interval.master.to(interval.param.dtype))
        ]

    def _live(self, interval: OwnedInterval) -> torch.Tensor:
        param, start, numel = interval.param, interval.start, interval.numel
        if self.wrapper == _STAGE3:
            return param.ds_tensor.detach().view(-1).narrow(0, 0, numel).to(interval.flat.device)
        return param.detach().view(-1).narrow(0, start, numel)

    @property
    def loss_scaler(self) -> Any | None:
        return getattr(self.engine.optimizer, "loss_scaler", None)


def _require(owner: Any, *attributes: str) -> None:
    lacking = [name for name in attributes if not hasattr(owner, name)]
    if lacking:
        raise UnsupportedOptimizerError(
            f"{type(owner).__name__} of this DeepSpeed has no {', '.join(lacking)}; this code was written against "
            "DeepSpeed 0.19.8. Install that version."
        )


def _zero_like(value: Any, flat: torch.Tensor) -> Any:
    """A fresh state for `flat`, of the kind the optimizer left on its one-element dummy."""
    if torch.is_tensor(value) and value.shape == (1,):
        return torch.zeros_like(flat, dtype=value.dtype, requires_grad=False)
    if torch.is_tensor(value):
        return torch.zeros_like(value)
    return value if value is None else type(value)(0)


def _plain(value: Any) -> Any:
    """As JSON keeps it."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
