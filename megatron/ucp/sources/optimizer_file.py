"""DeepSpeed's files of optimizer states (`*_optim_states.pt`): the one place that knows what is where in them, for
reading and for writing.

ZeRO-1, ZeRO-2 and BF16_Optimizer keep one flat tensor of masters for each parameter group, and a table that says which
parameters lie where in it. ZeRO-3 keeps several for each group and no table. Beside each lie the base optimizer's
states, in torch's own form or, under `elastic_checkpoint`, as a list without the groups' values.

    file = OptimizerFile.open(FileCache(), path)
    file.tables[0]["final_norm.weight"]               # (offset in the flat tensor of group 0, number of elements)
    file.masters()[0], file.state(0), file.key(0, "exp_avg")
    content = file_content(flats, groups, file.common(), zero_stage=2, num_ranks=3, config=None)

Sources of these conventions: deepspeed/runtime/zero/stage_1_and_2.py (state_dict, _get_base_optimizer_state,
_create_param_mapping), stage3.py (_rigid_state_dict), runtime/bf16_optimizer.py (state_dict).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.ucp.errors import CorruptFileError
from megatron.ucp.inert import FragmentAddress, LossScaler
from megatron.ucp.json_checks import shown
from megatron.ucp.manifest_schema import MAX_ELEMENTS
from megatron.ucp.sources.source import FileCache
from megatron.ucp.stored import is_tensor

_INSIDE = "optimizer_state_dict"
_BASE, _BASE_STAGE3 = "base_optimizer_state", "optimizer_state_dict"
_MASTERS, _MASTERS_STAGE3 = "single_partition_of_fp32_groups", "fp32_flat_groups"
_TABLES = "param_slice_mappings"
PARTITION_COUNT = "partition_count"

_STAGE = "zero_stage"
_PADDINGS, _PARAM_PADDINGS = "group_paddings", "param_alignment_paddings"
_NOT_OF_STAGE3 = ("clip_grad", "ds_version")
_COMMON = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "ds_version")

Table = dict[str, tuple[int, int]]
"""Parameter -> (offset in the flat tensor, number of elements there)."""


@dataclass(frozen=True)
class OptimizerFile:
    """`content` is what the file holds under its one key; a tensor is memory-mapped and read when it is touched."""

    path: Path
    content: Mapping[str, Any]
    is_stage3: bool

    @classmethod
    def open(cls, cache: FileCache, path: Path, zero_stage: int | None = None) -> OptimizerFile:
        """`zero_stage` None: as the file says. Raises CorruptFileError for another kind of file."""
        outside = cache.load(path)
        content = outside.get(_INSIDE) if isinstance(outside, Mapping) else None
        if not isinstance(content, Mapping):
            raise CorruptFileError(
                "not a file of optimizer states",
                found=list(outside) if isinstance(outside, Mapping) else type(outside).__name__,
                expected=_INSIDE,
                where=path,
                do="copy it again from where it was saved",
            )
        return cls(path, content, zero_stage == 3 if zero_stage is not None else _BASE not in content)

    @property
    def zero_stage(self) -> int:
        """BF16_Optimizer, which partitions as ZeRO-1 does, does not say one."""
        return int(self.content.get(_STAGE, 1))

    @property
    def is_of_bf16_optimizer(self) -> bool:
        return _STAGE not in self.content

    # -- the base optimizer ---------------------------------------------------------------------------------------

    @property
    def is_elastic(self) -> bool:
        return isinstance(self._base, list)

    def state(self, flat: int) -> Mapping[str, Any]:
        """Beside a flat tensor. An optimizer without states (plain SGD) has none."""
        return self._base[flat] if self.is_elastic else self._base["state"].get(flat, {})

    def states(self) -> list[Mapping[str, Any]]:
        return list(self._base if self.is_elastic else self._base["state"].values())

    def param_groups(self) -> list[dict[str, Any]]:
        """torch's, where `params` number the flat tensors; none under `elastic_checkpoint`."""
        return [] if self.is_elastic else self._base["param_groups"]

    def flat_groups(self, num_flats: int) -> list[int]:
        """The parameter group of each flat tensor: ZeRO-3 has several to a group, ZeRO-1 and 2 one."""
        owner = {flat: index for index, group in enumerate(self.param_groups()) for flat in group["params"]}
        return [owner.get(flat, flat) for flat in range(num_flats)]

    def is_muon(self, group: int) -> bool:
        groups = self.param_groups()
        return group < len(groups) and bool(groups[group].get("use_muon"))

    # -- masters and where parameters lie in them -----------------------------------------------------------------

    def masters(self) -> Sequence[Any]:
        """The flat tensors; in ZeRO-1 and 2 one for each parameter group."""
        return self.content[_MASTERS_STAGE3 if self.is_stage3 else _MASTERS]

    @cached_property
    def tables(self) -> list[Table]:
        """By parameter group; ZeRO-3 has none. Raises CorruptFileError."""
        try:
            return [
                {name: (count(address.start), count(address.numel)) for name, address in table.items()}
                for table in self.content[_TABLES]
            ]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CorruptFileError(
                f"no parameter table ({_TABLES})", found=repr(error)[:200], where=self.path
            ) from error

    def padding(self, group: int) -> int:
        """Elements at the end of the partition that belong to no parameter. Raises CorruptFileError."""
        try:
            paddings = self.content.get(_PADDINGS) or []
            return count(paddings[group]) if group < len(paddings) else 0
        except (LookupError, TypeError, ValueError) as error:
            raise CorruptFileError(
                f"{_PADDINGS} is no list of sizes", found=repr(error)[:200], where=self.path
            ) from error

    def alignment_paddings(self, group: int, num_parameters: int) -> list[int]:
        """Elements after each parameter of ZeRO-1 and 2 that belong to none; older DeepSpeeds have none."""
        return self.content.get(_PARAM_PADDINGS, {group: [0] * num_parameters})[group]

    @property
    def has_partitions_of_its_own(self) -> bool:
        """ZeRO-3 whose parameters are not all cut over the same ranks (MiCS, AutoEP)."""
        return bool(self.content.get("ds_zero_partition_groups"))

    def key(self, flat: int, state: str) -> tuple[str | int, ...]:
        """The path to a flat tensor inside the file: of masters ("fp32"), or of a state of the optimizer."""
        if state == "fp32":
            return _INSIDE, _MASTERS_STAGE3 if self.is_stage3 else _MASTERS, flat
        base = _BASE_STAGE3 if self.is_stage3 else _BASE
        return (_INSIDE, base, flat, state) if self.is_elastic else (_INSIDE, base, "state", flat, state)

    # -- the rest -------------------------------------------------------------------------------------------------

    def partition_counts(self) -> Any:
        """Over how many ranks each parameter group is cut, or all are; as the file has it."""
        return self.content.get(PARTITION_COUNT)

    def of_no_parameter(self) -> dict[str, Any]:
        """Loss scale, clipping and what else belongs to no parameter."""
        of_parameters = {_BASE_STAGE3 if self.is_stage3 else _BASE, _TABLES, _MASTERS, _MASTERS_STAGE3}
        return {key: value for key, value in self.content.items() if key not in of_parameters}

    def common(self) -> dict[str, Any]:
        """What of that does not depend on the ZeRO stage or the number of ranks."""
        return {key: self.content[key] for key in _COMMON if key in self.content}

    @property
    def _base(self) -> Any:
        name = _BASE_STAGE3 if self.is_stage3 else _BASE
        base = self.content.get(name)
        if not isinstance(base, (list, Mapping)):
            raise CorruptFileError(
                "no states of the base optimizer",
                found=type(base).__name__,
                expected=f"{_INSIDE} / {name}",
                where=self.path,
                do="use another checkpoint",
            )
        return base


@dataclass(frozen=True)
class FlatContent:
    """One flat tensor as it goes into a file. Tensors may be torch's or those of torch_file.StreamedTensor."""

    group: int
    masters: Any
    state: Mapping[str, Any]
    """Beside the masters: tensors of as many elements and `padding` more, and numbers."""
    padding: int = 0
    param_paddings: Sequence[int] = ()
    """Of all parameters of the group, those of other ranks too."""
    table: Table = field(default_factory=dict)


def file_content(
    flats: Sequence[FlatContent],
    param_groups: Sequence[Mapping[str, Any]],
    common: Mapping[str, Any],
    *,
    zero_stage: int,
    num_ranks: int,
    config: Any,
) -> dict[str, Any]:
    """What one rank's file holds, as the `load_state_dict` of its stage reads it. `param_groups`: torch's, whose
    `params` are filled in here. `common`: what OptimizerFile.common gives; ZeRO-3 takes no file without a scaler.
    `config`: DeepSpeed's."""
    numbers: list[list[int]] = [[] for _ in param_groups]
    for index, flat in enumerate(flats):
        numbers[flat.group].append(index)
    base = {
        "state": {index: dict(flat.state) for index, flat in enumerate(flats) if flat.state},
        "param_groups": [{**group, "params": held} for group, held in zip(param_groups, numbers, strict=True)],
    }
    scaler = LossScaler()
    scaler.cur_scale, scaler.dynamic = 1.0, False
    kept = {key: value for key, value in common.items() if zero_stage < 3 or key not in _NOT_OF_STAGE3}
    content = {"loss_scaler": scaler, "dynamic_loss_scale": False, "overflow": False, **kept, _STAGE: zero_stage}
    masters = [flat.masters for flat in flats]
    if zero_stage == 3:
        content |= {PARTITION_COUNT: num_ranks, _BASE_STAGE3: base, _MASTERS_STAGE3: masters}
    else:
        content |= {
            _BASE: base,
            _MASTERS: masters,
            _PADDINGS: [flat.padding for flat in flats],
            _PARAM_PADDINGS: [list(flat.param_paddings) for flat in flats],
            PARTITION_COUNT: [num_ranks] * len(flats),
            _TABLES: [{name: _address(*place) for name, place in flat.table.items()} for flat in flats],
        }
    return {_INSIDE: content, "ds_config": config, "ds_version": common.get("ds_version")}


def _address(offset: int, numel: int) -> FragmentAddress:
    address = FragmentAddress()
    address.numel, address.start = numel, offset
    return address


def numbers_in(state: Mapping[str, Any]) -> dict[str, float]:
    """What an optimizer keeps of a parameter beside tensors, the step apart (NAdam's mu_product)."""
    return {key: float(value) for key, value in state.items() if key != "step" and _is_number(value)}


def _is_number(value: Any) -> bool:
    if is_tensor(value):
        return value.dim() == 0 and str(value.dtype) != "torch.bool" and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def count(value: Any) -> int:
    """Of elements. Raises ValueError for what a file may hold instead."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ELEMENTS:
        raise ValueError(f"{shown(value)} is no number of elements")
    return value
