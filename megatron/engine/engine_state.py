"""Where the training state lives inside a DeepSpeed engine: every owned interval of every parameter.

Whatever the ZeRO stage, the master weights and the optimizer's states are flat tensors of the base
torch optimizer, and this rank holds an interval of each parameter's TP shard somewhere in them. `EngineState`
lists those intervals as views, so that saving a digest and placing a saved state are plain loops:

    state = EngineState(engine, layouts, context, pp_stages, frozen)
    for interval in state.intervals:
        interval.master.copy_(...)          # fp32, 1-D, a view into the optimizer's own tensor
        interval.state(state.base, "exp_avg").copy_(...)
    for interval in state.frozen_intervals:
        interval.weights.copy_(...)         # in the run's precision, the live weights themselves
    state.refresh_weights()                 # collective

A frozen parameter has no master and no optimizer state: its value is the live weight, in whatever precision the run
has. Where that is bf16 or fp16, its state "fp32" is the weight widened, and a load rounds what it reads.

This reads attributes of DeepSpeed's that are no public interface: deepspeed_names.py says which and looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from megatron.engine.deepspeed_names import require_built
from megatron.engine.optimizer_states import OptimizerStates, UnsupportedOptimizerError
from megatron.engine.protocols import Engine, LossScaler
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Layout
from megatron.ucp.runs import EMPTY, Runs, shard_runs, whole_runs

MASTER = "fp32"
"""Name of the master weight among the states, as on disk."""

_STAGE3 = "DeepSpeedZeroOptimizer_Stage3"
_FLAT_GROUPS = {"DeepSpeedZeroOptimizer": "bit16_groups", "BF16_Optimizer": "bf16_groups"}
"""Wrappers that keep each group's weights in one flat tensor, and the attribute that lists its parameters."""


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
    runs: Runs
    """Where the interval lies in the atomic parameter: int64 [n, 3] (atomic_start, local_start, length)."""
    counted_runs: Runs
    """Those runs that this rank counts in digests: another rank may hold the same elements and count them."""

    @property
    def master(self) -> torch.Tensor:
        return self.flat.detach().view(-1).narrow(0, self.flat_start, self.numel)

    def state(self, optimizer: torch.optim.Optimizer, key: str) -> torch.Tensor:
        return optimizer.state[self.flat][key].detach().view(-1).narrow(0, self.flat_start, self.numel)


@dataclass(frozen=True)
class FrozenInterval:
    """The same of a parameter that the optimizer does not know: whole on every data-parallel rank, a piece under
    ZeRO-3."""

    name: str
    param: torch.nn.Parameter
    start: int
    numel: int
    runs: Runs
    counted_runs: Runs

    @property
    def weights(self) -> torch.Tensor:
        """Live, 1-D."""
        return _live_weights(self.param, self.start, self.numel)


@dataclass(frozen=True)
class IntervalState:
    """What an interval holds of one state of its parameter."""

    state: str
    values: torch.Tensor
    """1-D, a view."""
    layout: Layout
    """The parameter's, or that of a state of another shape, which is never cut."""
    runs: Runs
    counted_runs: Runs


@dataclass(frozen=True)
class _Interval:
    param: torch.nn.Parameter
    flat: torch.Tensor
    flat_start: int
    start: int
    numel: int


class EngineState(OptimizerStates):
    """The optimizer's state of a live engine, by canonical parameter name. Construction is local."""

    def __init__(
        self,
        engine: Engine,
        layouts: Mapping[str, Layout],
        context: ParallelContext,
        pp_stages: Mapping[str, tuple[int, ...]],
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        """`layouts` and `pp_stages` (which stages hold a copy) cover every parameter of the whole model, `frozen` names
        those that are not trained. Raises DeepSpeedChangedError where this DeepSpeed lacks a name that is read."""
        require_built(engine)
        self.engine = engine
        self.layouts = layouts
        self.context = context
        self.pp_stages = pp_stages
        self.frozen = frozen
        self._step_homes: dict[int, str | None] = {}
        self.wrapper = type(engine.optimizer).__name__
        self.base: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self.shard_rank = context.shard_rank

    @cached_property
    def is_replicated(self) -> bool:
        """True under ZeRO-0: every data-parallel rank holds all of the state."""
        return isinstance(self.engine.optimizer, torch.optim.Optimizer)

    @cached_property
    def intervals(self) -> tuple[OwnedInterval, ...]:
        return tuple(self._owned(interval, self.group_names[group]) for group, interval in self._all_intervals())

    @cached_property
    def frozen_intervals(self) -> tuple[FrozenInterval, ...]:
        intervals = []
        for param, name in self.engine.param_names.items():
            if name in self.frozen:
                start, numel = _stage3_interval(param) if self.wrapper == _STAGE3 else (0, param.numel())
                if numel:
                    runs, counted = self._runs(name, start, numel, self.has_whole_frozen)
                    intervals.append(FrozenInterval(name, param, start, numel, runs, counted))
        return tuple(intervals)

    @property
    def weight_dtype(self) -> str:
        """Of the live weights."""
        return str(next(iter(self.engine.param_names)).dtype).removeprefix("torch.")

    @property
    def has_whole_frozen(self) -> bool:
        """Every data-parallel rank holds all of the frozen parameters: under all stages but ZeRO-3."""
        return self.wrapper != _STAGE3

    def _owned(self, interval: _Interval, group: str) -> OwnedInterval:
        name = self.engine.param_names[interval.param]
        runs, counted = self._runs(name, interval.start, interval.numel, self.is_replicated)
        return OwnedInterval(name, group, runs=runs, counted_runs=counted, **vars(interval))

    def _runs(self, name: str, start: int, numel: int, is_replicated: bool) -> tuple[Runs, Runs]:
        """(all, those counted here) of an interval of this rank's shard, of which every data-parallel rank (of experts:
        of the same ones) has a copy or not."""
        layout, context, stop = self.layouts[name], self.context, start + numel
        runs = shard_runs(layout, self.shard_rank, start, stop)
        copy = context.edp_rank if layout.is_cut_over("ep") else context.zero_rank
        if context.pp_rank != min(self.pp_stages[name]) or (copy > 0 and is_replicated):
            return runs, EMPTY
        return runs, shard_runs(layout, self.shard_rank, start, stop, owned=True)

    @property
    def flats(self) -> list[tuple[int, torch.Tensor]]:
        """(parameter group, flat tensor): the keys of the base optimizer's state, in the order of its indices."""
        if self.wrapper == _STAGE3:
            # Between steps stage 3 takes them out of the optimizer's groups.
            optimizer = self.engine.optimizer
            return [
                (optimizer.sub_group_to_group_id[s], f) for s, f in enumerate(optimizer.fp32_partitioned_groups_flat)
            ]
        return [(index, flat) for index, group in enumerate(self.base.param_groups) for flat in group["params"]]

    @property
    def flat_table(self) -> list[tuple[str, int, int, int]]:
        """(name, group, first element in the flat tensor, elements) of what this rank's file of ZeRO-1 or 2 holds;
        empty under other stages."""
        if self.wrapper not in _FLAT_GROUPS:
            return []
        names = self.engine.param_names
        return [(names[at.param], group, at.flat_start, at.numel) for group, at in self._all_intervals()]

    def _all_intervals(self) -> Iterator[tuple[int, _Interval]]:
        if self.is_replicated:
            for group, param in self.flats:
                yield group, _Interval(param, param, 0, 0, param.numel())  # type: ignore[arg-type]
        elif self.wrapper == _STAGE3:
            yield from self._stage3_intervals()
        elif self.wrapper in _FLAT_GROUPS:
            for group, flat in self.flats:
                yield from ((group, interval) for interval in self._flat_intervals(group, flat))
        else:
            raise UnsupportedOptimizerError(
                f"optimizer state under DeepSpeed's {self.wrapper} cannot be located; known are ZeRO-0 in fp32, "
                "ZeRO-1/2/3 and BF16_Optimizer. Choose --zero-stage 1 or 2."
            )

    def _flat_intervals(self, group: int, flat: torch.Tensor) -> Iterator[_Interval]:
        """ZeRO-1/2: the group's shards one after the other, cut into one interval per data-parallel rank."""
        optimizer, attribute = self.engine.optimizer, _FLAT_GROUPS[self.wrapper]
        weights_flat = getattr(optimizer, attribute + "_flat")[group]
        partition = flat.numel() * dist.get_rank(group=optimizer.real_dp_process_group[group])
        for param in getattr(optimizer, attribute)[group]:
            # The storage position is the truth: DeepSpeed's own hp mapping is wrong under round_robin_gradients.
            offset = (param.data_ptr() - weights_flat.data_ptr()) // weights_flat.element_size()
            begin = max(offset, partition)
            end = min(offset + param.numel(), partition + flat.numel())
            if end > begin:
                yield _Interval(param, flat, begin - partition, begin - offset, end - begin)

    def _stage3_intervals(self) -> Iterator[tuple[int, _Interval]]:
        """ZeRO-3: every parameter by itself in equal pieces, the last ones padded (with whatever was in memory)."""
        optimizer = self.engine.optimizer
        for (group, flat), params in zip(self.flats, optimizer.fp16_groups, strict=True):
            position = 0
            for param in params:
                start, numel = _stage3_interval(param)
                if numel:
                    yield group, _Interval(param, flat, position, start, numel)
                position += param.partition_numel()

    @property
    def members(self) -> list[list[str]]:
        """For each of `flats` the parameters of which some data-parallel rank has a part in it, in order."""
        if self.is_replicated:
            return [[self.engine.param_names[param]] for _, param in self.flats]
        if self.wrapper == _STAGE3:
            groups = self.engine.optimizer.fp16_groups
        else:
            of_group = getattr(self.engine.optimizer, _FLAT_GROUPS[self.wrapper])
            groups = [of_group[group] for group, _ in self.flats]
        return [[self.engine.param_names[param] for param in params] for params in groups]

    @property
    def stage3_order(self) -> list[list[str]]:
        """Names in each of ZeRO-3's sub-groups; empty under other stages."""
        return self.members if self.wrapper == _STAGE3 else []

    def states_of(self, interval: OwnedInterval) -> Iterator[IntervalState]:
        """The master weight and every tensor state, as far as they are this interval's."""
        layout = self.layouts[interval.name]
        yield IntervalState(MASTER, interval.master, layout, interval.runs, interval.counted_runs)
        for key, value in self.tensor_states(interval.flat).items():
            if value.shape == interval.flat.shape:
                values = interval.state(self.base, key)
                yield IntervalState(key, values, layout, interval.runs, interval.counted_runs)
            else:
                runs = whole_runs(value.numel())
                counted = runs if len(interval.counted_runs) else EMPTY
                yield IntervalState(key, value.detach().view(-1), Layout.unique(value.shape), runs, counted)

    def before_next_step(self, call: Callable[[], None]) -> RemovableHandle:
        """Before the optimizer changes anything: until then masters, moments and weights stay as they are, through
        forward and backward. A step that is skipped changes nothing and tells nothing. Local."""
        return self.base.register_step_pre_hook(lambda *_: call())

    @property
    def steps_taken(self) -> int:
        """Of the optimizer, without those that were skipped."""
        return self.engine.global_steps - self.engine.skipped_steps

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

    def held_weights(self) -> list[torch.Tensor]:
        """What this rank holds of the live weights: under ZeRO-3 its pieces."""
        return [getattr(param, "ds_tensor", param).detach() for param in self.engine.param_names]

    def stale_weights(self) -> list[str]:
        """Parameters whose live weights are not their masters, rounded: computing would go on with something else
        than what was placed. Local: this rank's own intervals."""
        return [
            interval.name
            for interval in self.intervals
            if not torch.equal(
                _live_weights(interval.param, interval.start, interval.numel).to(interval.flat.device),
                interval.master.to(interval.param.dtype),
            )
        ]

    @property
    def loss_scaler(self) -> LossScaler | None:
        return getattr(self.engine.optimizer, "loss_scaler", None)


def is_locatable(optimizer: object) -> bool:
    """Whether the state under this wrapper of DeepSpeed's, or in torch's optimizer itself, can be found."""
    return isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__name__ in (_STAGE3, *_FLAT_GROUPS)


def whole_shape(param: torch.nn.Parameter) -> tuple[int, ...]:
    """Of this rank's shard: under ZeRO-3 a parameter is empty between steps, and remembers its shape."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _live_weights(param: torch.nn.Parameter, start: int, numel: int) -> torch.Tensor:
    """Elements [start, start + numel) of the shard, of which ZeRO-3 keeps just this rank's piece."""
    if hasattr(param, "ds_tensor"):
        return param.ds_tensor.detach().view(-1).narrow(0, 0, numel)
    return param.detach().view(-1).narrow(0, start, numel)


def _stage3_interval(param: torch.nn.Parameter) -> tuple[int, int]:
    """(start, numel) of this rank's piece of a parameter's shard; the last ranks may have only padding."""
    length = param.partition_numel()
    start = min(dist.get_rank(group=param.ds_process_group) * length, param.ds_numel)
    return start, min(length, param.ds_numel - start)
