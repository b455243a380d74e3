"""What the optimizer that steps keeps, whatever it is: states made, checked, counted and set, by flat tensor.

Nothing here knows an optimizer by name. Tensors of the shape of the flat are cut as the parameters are;
tensors of another shape are carried whole where every rank has whole parameters, and refused elsewhere; numbers are
carried by name; the step is found where the optimizer counts it.

    state.make_states()                        # state is an EngineState
    state.step_of(flat), state.scalars_of(flat), state.hyper_parameters()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from megatron.engine.optimizer_probe import STEP, is_elementwise, kept_states, kind_of_state
from megatron.engine.protocols import Engine
from megatron.parallel.context import ParallelContext
from megatron.ucp.json_checks import shown

_HOW = ("fused", "foreach", "capturable", "differentiable")
"""Of torch's optimizers: which implementation steps, which is the machine's choice (--fused-kernels), not the run's."""
_NO_HYPER_PARAMETERS = ("params", "name", STEP, "moe")
"""In torch's parameter groups; "moe" is DeepSpeed's mark of what expert-parallel ranks hold different values of."""


class UnsupportedOptimizerError(RuntimeError):
    """An optimizer whose state cannot be found, or not be carried from one topology to another, or whose training would
    depend on the topology."""


class OptimizerStates(ABC):
    """The part of EngineState that knows no parameters but by name. Everything is local."""

    engine: Engine
    context: ParallelContext
    base: torch.optim.Optimizer
    """The optimizer that steps, under DeepSpeed's wrapper."""
    _step_homes: dict[int, str | None]

    @property
    @abstractmethod
    def flats(self) -> list[tuple[int, torch.Tensor]]:
        """(parameter group, flat tensor): the keys of the base optimizer's state, in the order of its indices."""

    @property
    @abstractmethod
    def members(self) -> list[list[str]]:
        """For each of `flats` the parameters of which some data-parallel rank has a part in it, in order."""

    @property
    @abstractmethod
    def is_replicated(self) -> bool:
        """True under ZeRO-0: every data-parallel rank holds all of the state."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """The tensor states that the optimizer keeps on this rank (exp_avg, ...), sorted; needs `make_states`."""
        return tuple(sorted({key for _, flat in self.flats for key in self.tensor_states(flat)}))

    def tensor_states(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = self.base.state[flat]
        return {key: kept[key] for key in sorted(kept) if kind_of_state(kept[key], flat.shape) in ("cut", "whole")}

    def make_states(self, is_saved: bool = False) -> None:
        """Create the optimizer's states (zeros) where a fresh engine has none yet, without taking a step.

        What the optimizer leaves on a dummy is the template, so no table of optimizers is needed. The training that
        follows is bitwise the one without this call, if the states are `is_saved` or loaded. Raises
        UnsupportedOptimizerError for a state that cannot be carried to another topology.
        """
        for (group, flat), names in zip(self.flats, self.members, strict=True):
            if not self.base.state[flat]:
                template = self._template(flat)
                kept = kept_states(self.base, self.base.param_groups[group], template)
                if is_saved and kept.unknown_when_fresh:
                    raise UnsupportedOptimizerError(
                        f"{self.class_name} has not stepped {names[0]} yet, and the first value of its "
                        f"{', '.join(kept.unknown_when_fresh)} is not known. Save after the first step."
                    )
                self._check_carried(names, kept.states, template.shape)
                made = {key: _zero_like(value, flat, template.shape) for key, value in kept.states.items()}
                self.base.state[flat].update(made)
            else:
                self._check_carried(names, self.base.state[flat], flat.shape)
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            # So that DeepSpeed's own accessors (and its savers) see these tensors.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def check_optimizer(self, is_saved: bool) -> None:
        """Before training, so that nobody trains for a day first. Raises UnsupportedOptimizerError for an optimizer
        that this topology would make train differently, or (`is_saved`) whose state could not be saved."""
        is_cut = not self.has_whole_tensors and not getattr(self.base, "gathers_matrices", False)
        for group, flat in dict(self.flats).items():
            if is_cut and not is_elementwise(self.base, self.base.param_groups[group], flat):
                raise UnsupportedOptimizerError(
                    f"{self.class_name} steps a part of a parameter in another way than the whole, so it would train "
                    f"differently under every topology. Found: {self._topology}. Expected: every rank has whole "
                    "parameters. What to do: --zero-stage 0 with --tensor-model-parallel-size 1, or --optimizer "
                    "adam, sgd, lion, adagrad or muon."
                )
        if is_saved:
            for (group, flat), names in zip(self.flats, self.members, strict=True):
                template = self._template(flat)
                kept = kept_states(self.base, self.base.param_groups[group], template)
                self._check_carried(names, kept.states, template.shape)

    def _template(self, flat: torch.Tensor) -> torch.Tensor:
        """What an optimizer treats as it does `flat`, without the size of a partition."""
        return flat if self.is_replicated else flat.new_zeros(2)

    @property
    def has_whole_tensors(self) -> bool:
        """The optimizer steps whole parameters."""
        return self.is_replicated and self.context.tp_size == 1 and self.context.topology.ep_size == 1

    @property
    def class_name(self) -> str:
        return type(self.base).__name__

    @property
    def _topology(self) -> str:
        return f"{self.context.topology}, ZeRO-{self.engine.zero_optimization_stage()}"

    def _check_carried(self, names: list[str], states: Mapping[str, Any], shape: torch.Size) -> None:
        for key, value in states.items():
            kind = kind_of_state(value, shape)
            if value is None or kind in ("cut", "scalar") or (kind == "whole" and self.has_whole_tensors):
                continue
            found = f"{value.dtype} of shape {tuple(value.shape)}" if torch.is_tensor(value) else repr(type(value))
            raise UnsupportedOptimizerError(
                f"the state {key!r} that {self.class_name} keeps of {names[0]} cannot be cut for another topology. "
                f"Found: {found} under {self._topology}. Expected: bf16, fp16 or fp32 of the parameter's shape, or a "
                "number. What to do: use another --optimizer; states of other shapes are carried whole only under "
                "--zero-stage 0 with --tensor-model-parallel-size 1."
            )

    def scalars_of(self, flat: torch.Tensor) -> dict[str, float]:
        """Numbers that the optimizer keeps for a tensor, the step apart."""
        kept = self.base.state[flat]
        return {
            key: _plain(kept[key])
            for key in sorted(kept)
            if key != STEP and kind_of_state(kept[key], flat.shape) == "scalar"
        }

    def set_scalar(self, flat: torch.Tensor, key: str, value: float) -> None:
        _set_number(self.base.state[flat], key, value)

    def step_of(self, flat: torch.Tensor) -> float | None:
        """How often the optimizer has stepped it, wherever it counts that."""
        group = self._group_of[flat]
        home = self._step_home(group)
        if home is None:
            return None
        if home == "group":
            return float(self.base.param_groups[group].get(STEP, 0))
        beside = [flat] if home == "state" else [other for index, other in self.flats if index == group]
        return max(float(self.base.state[other].get(STEP, 0)) for other in beside)

    def set_step(self, flat: torch.Tensor, step: float) -> None:
        group = self._group_of[flat]
        home = self._step_home(group)
        if home is not None:
            owner = self.base.param_groups[group] if home == "group" else self.base.state[flat]
            _set_number(owner, STEP, step)

    def forget(self, flat: torch.Tensor) -> None:
        """As before the optimizer's first step: it makes its states itself then."""
        self.set_step(flat, 0)
        self.base.state[flat].clear()

    @cached_property
    def _group_of(self) -> dict[torch.Tensor, int]:
        return {flat: group for group, flat in self.flats}

    def _step_home(self, group: int) -> str | None:
        if group not in self._step_homes:
            like = next(flat for index, flat in self.flats if index == group).new_zeros(2)
            self._step_homes[group] = kept_states(self.base, self.base.param_groups[group], like).step_home
        return self._step_homes[group]

    @property
    def group_names(self) -> list[str]:
        """Of the optimizer's parameter groups; group_0, group_1, ... where whoever made them gave none."""
        return [group.get("name", f"group_{index}") for index, group in enumerate(self.base.param_groups)]

    def hyper_parameters(self) -> dict[str, dict[str, Any]]:
        """Every group's hyper-parameters by the group's name."""
        return {
            name: {key: _plain(value) for key, value in group.items() if key not in _NO_HYPER_PARAMETERS}
            for name, group in zip(self.group_names, self.base.param_groups, strict=True)
        }

    def hyper_parameter_faults(self, groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Values of `set_hyper_parameters`'s argument that are not of the kind that the optimizer has there."""
        return [
            f"optimizer group {group}: {key} is {shown(groups[group][key])} in the Source, {shown(value)} here"
            for group, values in self.hyper_parameters().items()
            for key, value in values.items()
            if key in groups.get(group, {}) and key not in _HOW and value is not None
            if _type_of(groups[group][key]) != _type_of(value)
        ]

    def set_hyper_parameters(self, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """In place and by name: group indices differ between topologies (a stage drops its empty groups)."""
        for name, group in zip(self.group_names, self.base.param_groups, strict=True):
            for key, value in groups.get(name, {}).items():
                if key in _HOW:
                    continue
                group[key] = tuple(value) if isinstance(value, list) else value


def _zero_like(value: Any, flat: torch.Tensor, shape: torch.Size) -> Any:
    """A fresh state for `flat`, of the kind the optimizer left on its dummy of that shape."""
    if torch.is_tensor(value) and value.shape == shape:
        return torch.zeros_like(flat, dtype=value.dtype, requires_grad=False)
    if torch.is_tensor(value):
        return torch.zeros_like(value)
    return value if value is None else type(value)(0)


def _set_number(owner: Any, key: str, value: float) -> None:
    """In place, as the optimizer keeps it: a tensor or a number."""
    if torch.is_tensor(owner.get(key)):
        owner[key].fill_(value)
    else:
        owner[key] = type(owner.get(key, 0))(value)


def _type_of(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_type_of(entry) for entry in value]
    return "a number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)


def _plain(value: Any) -> Any:
    """As JSON keeps it."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
