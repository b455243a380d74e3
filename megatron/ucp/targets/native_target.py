"""Which of DeepSpeed's native forms is wanted, whether a Source can be given it, and what its settings say of the form.

target = NativeTarget.parse("zero2", dp_size=3)
groups = require_writable(source, target)         # raises with all reasons why not

A few settings decide where an element lies in DeepSpeed's files. They are taken from the configuration that the
checkpoint carries, because a program that loads it has them too.

Sources: deepspeed/runtime/zero/config.py, runtime/engine.py (_do_optimizer_sanity_check).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.ucp.errors import CorruptFileError, UcpError, UnsupportedCheckpointError, listed
from megatron.ucp.sources.deepspeed import DeepSpeedSource
from megatron.ucp.sources.foreign.expert_files import has_experts
from megatron.ucp.sources.optimizer_groups import OptimizerGroup, is_round_robin, optimizer_groups
from megatron.ucp.sources.source import Source
from megatron.ucp.stored import DType, is_tensor
from megatron.ucp.topology import Topology

_SUB_GROUP_SIZE = 1_000_000_000
_ALIGNED_BYTES = 16
NAMES = ("zero0", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class NativeTarget:
    zero_stage: int
    dp_size: int

    def __post_init__(self) -> None:
        Topology(dp_size=self.dp_size)  # raises UcpError where it is no number of ranks
        if self.zero_stage not in range(len(NAMES)):
            raise UcpError("no such ZeRO stage", found=self.zero_stage, expected=NAMES)

    @classmethod
    def parse(cls, name: str, dp_size: int) -> NativeTarget:
        """`name`: one of NAMES."""
        return cls(NAMES.index(name), dp_size)

    def __str__(self) -> str:
        return f"{NAMES[self.zero_stage]} dp{self.dp_size}"


@dataclass(frozen=True)
class ZeroSettings:
    """What DeepSpeed's configuration says of the form of its files; its defaults where there is none."""

    config: Mapping[str, Any] | None

    @classmethod
    def of(cls, model_states: Mapping[str, Any]) -> ZeroSettings:
        config = model_states.get("ds_config")
        return cls(config if isinstance(config, Mapping) else None)

    def _section(self, name: str) -> Mapping[str, Any]:
        section = (self.config or {}).get(name)
        return section if isinstance(section, Mapping) else {}

    @property
    def is_bf16(self) -> bool:
        return bool((self._section("bf16") or self._section("bfloat16")).get("enabled"))

    @property
    def global_batch(self) -> int | None:
        size = (self.config or {}).get("train_batch_size")
        return size if isinstance(size, int) and size > 0 else None

    @property
    def sub_group_size(self) -> int:
        size = self._section("zero_optimization").get("sub_group_size", _SUB_GROUP_SIZE)
        return int(size) if isinstance(size, (int, float)) and 1 <= size < math.inf else _SUB_GROUP_SIZE

    @property
    def has_shard_groups(self) -> bool:
        size = self._section("zero_optimization").get("mics_shard_size", -1)
        return isinstance(size, int) and size > 0

    def param_alignment(self, dtype: DType) -> int:
        """Elements to a multiple of which ZeRO-1 and 2 pad each parameter."""
        is_aligned = self._section("zero_optimization").get("parameter_alignment")
        return max(1, _ALIGNED_BYTES // dtype.itemsize) if is_aligned else 1

    def is_round_robin(self, zero_stage: int) -> bool:
        """BF16_Optimizer, which takes the place of ZeRO-1 where gradients are summed in fp32, deals none by turns."""
        sums_in_fp32 = self._section("data_types").get("grad_accum_dtype") in ("fp32", "float32")
        if zero_stage == 1 and self.is_bf16 and sums_in_fp32:
            return False
        return is_round_robin({"ds_config": self.config}, zero_stage)

    def for_stage(self, zero_stage: int) -> Any:
        if self.config is None:
            return None
        return {**self.config, "zero_optimization": {**self._section("zero_optimization"), "stage": zero_stage}}


def require_writable(source: Source, target: NativeTarget) -> list[OptimizerGroup]:
    """The optimizer's groups of a Source that can be written as `target`. Raises UnsupportedCheckpointError with all
    reasons why it cannot, CorruptFileError where its groups are not of its parameters."""
    manifest = source.manifest
    if not isinstance(source, DeepSpeedSource):
        raise UnsupportedCheckpointError(
            "a universal folder holds no buffers and no program's state of its own",
            found=source.folder,
            do="convert the checkpoint it was made from",
        )
    content = source.model_states(0)
    topology = manifest.topology
    sizes = {axis: getattr(topology, f"{axis}_size") for axis in ("tp", "pp", "ep")}
    faults = [
        f"{axis} {size}: only checkpoints of tp 1, pp 1, ep 1 can be cut anew"
        for axis, size in sizes.items()
        if size > 1
    ]
    padded = [
        name
        for name, info in manifest.parameters.items()
        if any(cut.padded not in (None, info.layout.shape[cut.dim]) for cut in info.layout.cuts)
    ]
    if padded:
        faults.append(f"{listed(padded)}: padded, and the padding is kept nowhere (pretrain_gpt.py loads it as it is)")
    if manifest.is_pipelined:
        faults.append("a pipeline's weights lie in files of their own")
    if content.get("num_experts") or has_experts(source.folder):
        faults.append("a mixture of experts has files of its own")
    if not isinstance(content.get("module"), Mapping):
        faults.append(f"its weights are not kept by name ({type(content.get('module')).__name__})")
    if faults:
        raise _refused(source, target, faults)
    module, shared = content["module"], content.get("shared_params") or {}
    faults = [f"{name} is not among its weights" for name in manifest.parameters if not is_tensor(module.get(name))]
    faults += (
        [] if isinstance(shared, Mapping) else [f"its second names of weights are no table ({type(shared).__name__})"]
    )
    if faults:
        raise _refused(source, target, faults)
    try:
        groups = optimizer_groups(source)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"the optimizer's groups are not as DeepSpeed writes them ({type(error).__name__}: {error})"[:400],
            where=source.folder,
            do="use another checkpoint",
        ) from error
    faults = _faults_of_settings(content, manifest.parameters, target) + [
        f for group in groups for f in _faults_of_group(source, group, target)
    ]
    if faults:
        raise _refused(source, target, faults)
    return groups


def _faults_of_settings(content: Mapping[str, Any], names: Iterable[str], target: NativeTarget) -> list[str]:
    faults = []
    if target.zero_stage == 0 and {str(content["module"][name].dtype) for name in names} - {"torch.float32"}:
        faults.append("ZeRO-0 in half precision keeps its optimizer's states in another form: choose zero1")
    if target.zero_stage == 3 and ZeroSettings.of(content).has_shard_groups:
        faults.append("its configuration asks for MiCS (mics_shard_size)")
    return faults


def _faults_of_group(source: DeepSpeedSource, group: OptimizerGroup, target: NativeTarget) -> list[str]:
    if group.values.get("use_muon"):
        return ["Muon keeps its states in a form of its own"]
    if target.zero_stage == 0:
        return []
    if not group.names:
        return ["a group of the optimizer has no parameter that is trained"]
    faults = []
    first = group.names[0]
    for name in group.names:
        info = source.manifest.parameters[name]
        if set(info.states[1:]) != set(group.states):
            faults.append(f"{name} has {list(info.states[1:])}, others of its group {list(group.states)}")
        elif info.shapes:
            faults.append(f"{name} has states of other shapes than its own: {info.shapes}")
        elif _plain(group.numbers[name]) != _plain(group.numbers[first]):
            faults.append(f"{name} is at {_plain(group.numbers[name])}, {first} at {_plain(group.numbers[first])}")
    return faults


def _plain(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.item() if is_tensor(value) else value for key, value in numbers.items()}


def _refused(source: Source, target: NativeTarget, faults: list[str]) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"this checkpoint cannot be written as DeepSpeed's own {target}",
        found=faults,
        where=source.folder,
        do="convert it to a universal folder (without --to), or load it with megatron.ucp_deepspeed installed",
    )
