"""Target: the files that DeepSpeed itself would have saved under another ZeRO stage or on another number of ranks.

Whoever loads them needs nothing of ours: `load_checkpoint` of stock DeepSpeed takes its own stage's files,
of its own number of ranks, and nothing else. So the parameters are laid into flat tensors as that stage lays them
(flat_layout.py), each rank's file is written front to back in one pass, and a ucp.json beside them proves it.

    groups = require_writable(source, NativeTarget(zero_stage=2, dp_size=3))     # before anything is written
    manifest = write_native(source, staging, target=NativeTarget(zero_stage=2, dp_size=3), groups=groups)

Source of these conventions: deepspeed/runtime/engine.py (_common_checkpoint_state, _get_rank_zero_ckpt_name,
_get_zero_frozen_param_attributes), runtime/zero/stage_1_and_2.py and stage3.py (load_state_dict).
"""

from __future__ import annotations

import copy
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.ucp.digest import Digest
from megatron.ucp.errors import UcpError
from megatron.ucp.execute import CHUNK, pour
from megatron.ucp.file_names import model_file, optimizer_file
from megatron.ucp.manifest import FORMAT_VERSION, FileInfo, Manifest
from megatron.ucp.partial_sums import PartialSums
from megatron.ucp.sources.deepspeed import FROZEN, DeepSpeedSource
from megatron.ucp.sources.optimizer_file import FlatContent, file_content
from megatron.ucp.sources.optimizer_groups import OptimizerGroup, round_robin
from megatron.ucp.stored import FLOAT32, DType, Size, StoredTensor, as_stored, is_tensor, place_of
from megatron.ucp.targets.flat_layout import Flat, Segment, param_paddings, stage3_flats, stage3_slice, stage12_flats
from megatron.ucp.targets.native_target import NativeTarget, ZeroSettings
from megatron.ucp.targets.other_files import copy_other_files
from megatron.ucp.targets.proof import require_saved
from megatron.ucp.topology import Topology
from megatron.ucp.torch_file import Record, StreamedTensor, save_streamed


def write_native(
    source: DeepSpeedSource,
    folder: Path,
    *,
    target: NativeTarget,
    groups: Sequence[OptimizerGroup],
    num_workers: int = 2,
    progress: Callable[[int], None] = lambda num_bytes: None,
    sums: PartialSums | None = None,
) -> Manifest:
    """Fills `folder` with everything but ucp.json, and returns that. `groups`: what `require_writable` gave. `progress`
    is told bytes of states as they are written, from several threads; `sums` takes the CRCs of what was read. The first
    failure stops the others."""
    writer = _Writer(source, target, groups, progress, sums)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        futures = {name: pool.submit(writer.write, make, folder / name) for name, make in writer.files().items()}
        try:
            errors = [error for future in futures.values() if (error := future.exception())]
        except BaseException:  # an interrupt: the pool waits for its workers before it lets us go
            writer.stop.set()
            raise
    if errors:
        raise next((error for error in errors if not isinstance(error, _Stopped)), errors[0])
    return writer.manifest(
        {name: future.result() for name, future in futures.items()} | copy_other_files(source, folder)
    )


class _Stopped(Exception):
    """Another file failed; its error is the one to report."""


class _Writer:
    def __init__(
        self,
        source: DeepSpeedSource,
        target: NativeTarget,
        groups: Sequence[OptimizerGroup],
        progress: Callable[[int], None],
        sums: PartialSums | None,
    ):
        self.source, self.target, self.progress, self.sums = source, target, progress, sums
        self.settings = ZeroSettings.of(source.model_states(0))
        in_turns = self.settings.is_round_robin(target.zero_stage)
        self.groups = [
            replace(group, names=round_robin(group.names, target.dp_size)) if in_turns else group for group in groups
        ]
        self.parameters = source.manifest.parameters
        self.frozen = [name for name, info in self.parameters.items() if not info.is_trainable]
        self.flats = self._laid_out()
        self.digests: dict[tuple[str, str], Digest] = {}
        self.stop = threading.Event()
        self._lock = threading.Lock()
        if source.manifest.is_partitioned:
            source.fragments()  # the source's index, before the threads ask for it

    def _laid_out(self) -> list[list[Flat]]:
        """By rank."""
        stage, dp_size = self.target.zero_stage, self.target.dp_size
        numels = [{name: self.parameters[name].layout.numel for name in group.names} for group in self.groups]
        if stage == 0:
            return []
        if stage == 3:
            return stage3_flats(numels, dp_size, self.settings.sub_group_size)
        return stage12_flats(numels, dp_size, self._param_alignment)

    @property
    def _param_alignment(self) -> int:
        module = self.source.model_states(0)["module"]
        dtypes = [module[name].dtype for group in self.groups for name in group.names[:1]]
        return self.settings.param_alignment(dtypes[0]) if dtypes else 1

    def files(self) -> dict[str, Callable[[], Any]]:
        """What makes the content of each, by name; the larger ones first."""
        stage, ranks = self.target.zero_stage, range(self.target.dp_size)
        is_bf16 = self.settings.is_bf16 or any(p.name.startswith("bf16_") for p in self.source.files.zeros.values())
        optimizers = {optimizer_file(rank, 0, is_bf16): rank for rank in ranks} if stage else {}
        models = {model_file(rank, 0, stage): rank for rank in (ranks if stage == 3 else [0])}
        jobs = {name: functools.partial(self.optimizer, rank) for name, rank in optimizers.items()}
        return jobs | {name: functools.partial(self.model, rank) for name, rank in models.items()}

    def write(self, make: Callable[[], Any], path: Path) -> FileInfo:
        try:
            return save_streamed(make(), path)
        except (UcpError, _Stopped):
            self.stop.set()
            raise
        except Exception as error:
            self.stop.set()
            raise UcpError(
                f"writing {path.name} failed: {type(error).__name__}: {error}", where=self.source.folder
            ) from error

    # -- values -------------------------------------------------------------------------------------------------

    def pour(self, record: Record, name: str, state: str, segment: Segment, dtype: DType, counts: bool) -> None:
        """`counts`: towards digests and progress, as each element of a state does once."""

        def told(num_elements: int) -> None:
            if self.stop.is_set():
                raise _Stopped
            if counts:
                self.progress(4 * num_elements)

        start, stop = segment.start, segment.stop
        digest = pour(self.source, name, state, record, start, stop, dtype=dtype, told=told, sums=self.sums)
        if counts:
            with self._lock:
                self.digests[name, state] = self.digests.get((name, state), Digest()) + digest

    def whole(self, name: str, state: str, dtype: DType, counts: bool) -> StreamedTensor:
        layout = self.parameters[name].layout_of(state)
        segment = Segment(name, 0, layout.numel)
        return StreamedTensor(layout.shape, dtype, lambda to: self.pour(to, name, state, segment, dtype, counts))

    def flat(self, segments: Sequence[Segment], state: str, dtype: DType) -> StreamedTensor:
        def write(record: Record) -> None:
            for segment in segments:
                if segment.name is not None:
                    self.pour(record, segment.name, state, segment, dtype, counts=True)
                    continue
                for start in range(0, segment.numel, CHUNK):
                    record.write(np.zeros(min(CHUNK, segment.numel - start), dtype=dtype.numpy))

        return StreamedTensor((sum(segment.numel for segment in segments),), dtype, write)

    def dtype_of(self, name: str, state: str) -> DType:
        """As the Source keeps it."""
        pieces = self.source.pieces(name, state)
        return self.source.tensor(pieces[0]).dtype if pieces else FLOAT32

    # -- files of optimizer states ------------------------------------------------------------------------------

    def optimizer(self, rank: int) -> dict[str, Any]:
        stage = self.target.zero_stage
        manifest = self.source.manifest
        common = self.source.optimizer_file(0).common() if manifest.is_partitioned else {}
        common.setdefault("ds_version", self.source.model_states(0).get("ds_version"))
        flats = [self._flat_content(flat) for flat in self.flats[rank]]
        groups = [group.values for group in self.groups]
        config = self.settings.for_stage(stage)
        return file_content(flats, groups, common, zero_stage=stage, num_ranks=self.target.dp_size, config=config)

    def _flat_content(self, flat: Flat) -> FlatContent:
        group = self.groups[flat.group]
        name = group.names[0]
        padded = (*flat.segments, Segment(None, 0, flat.padding))
        numels = {name: self.parameters[name].layout.numel for name in group.names}
        return FlatContent(
            group=flat.group,
            masters=self.flat(flat.segments, "fp32", self.dtype_of(name, "fp32")),
            state={
                **{state: self.flat(padded, state, self.dtype_of(name, state)) for state in group.states},
                **_own(group.numbers[name]),
            },
            padding=flat.padding,
            param_paddings=param_paddings(numels, self._param_alignment),
            table=flat.table(),
        )

    # -- files of model states ----------------------------------------------------------------------------------

    def model(self, rank: int) -> dict[str, Any]:
        """Everything else in it is as it was: counters, schedule, the program's own state."""
        stage, manifest = self.target.zero_stage, self.source.manifest
        theirs = rank if manifest.zero_stage == 3 and rank < manifest.topology.zero_size else 0
        content = dict(self.source.model_states(0, theirs))
        shared = aliases(self.source.model_states(0), manifest)
        module, frozen = self._weights(content["module"], shared, rank)
        shapes = {name: Size(self.parameters[name].layout.shape) for name in self.parameters}
        lists_frozen = stage >= 2 and bool(self.frozen)
        content |= {
            "module": module,
            "optimizer": None if stage else self._whole_optimizer(),
            "param_shapes": self._param_shapes(shapes) if stage else None,
            "shared_params": (shared if rank == 0 else {}) if stage else None,  # as DeepSpeed has it
            "frozen_param_shapes": OrderedDict((n, shapes[n]) for n in self.frozen) if lists_frozen else None,
            FROZEN: OrderedDict((name, frozen[name]) for name in self.frozen) if lists_frozen else None,
            "dp_world_size": self.target.dp_size,
            "ds_config": self.settings.for_stage(stage),
        }
        return content

    def _weights(
        self, held: Mapping[str, Any], shared: Mapping[str, str], rank: int
    ) -> tuple[OrderedDict[str, Any], dict[str, Any]]:
        """(what "module" holds, what the list of frozen parameters holds)."""
        is_cut = self.target.zero_stage == 3
        weights: OrderedDict[str, Any] = OrderedDict()
        frozen: dict[str, Any] = {}
        for name, value in held.items():
            real = shared.get(name, name)
            if real not in self.parameters:
                weights[name] = value
            elif real in weights:
                weights[name] = weights[real]
            elif is_cut:
                dtype = as_stored(value).dtype
                weights[real] = weights[name] = StoredTensor.of_array(np.empty(0, dtype.numpy), dtype)
            else:
                weights[real] = weights[name] = self._weight(real, as_stored(value))
        weights = OrderedDict((name, weights[name]) for name in held)
        for name in self.frozen:
            if is_cut:
                slices = stage3_slice(name, self.parameters[name].layout.numel, rank, self.target.dp_size)
                frozen[name] = self.flat(slices, "fp32", as_stored(held[name]).dtype)
            else:
                frozen[name] = weights[name]
        return weights, frozen

    def _weight(self, name: str, held: StoredTensor) -> Any:
        """Frozen ones, and under ZeRO-0 all, are states to be proven; others are what the masters were rounded to."""
        info = self.parameters[name]
        if self.target.zero_stage and info.is_trainable and tuple(held.shape) == info.layout.shape:
            return held
        return self.whole(name, "fp32", held.dtype, counts=not (self.target.zero_stage and info.is_trainable))

    def _param_shapes(self, shapes: Mapping[str, Size]) -> list[OrderedDict[str, Size]]:
        """By group, or by sub-group."""
        if self.target.zero_stage < 3:
            return [OrderedDict((name, shapes[name]) for name in group.names) for group in self.groups]
        return [OrderedDict((name, shapes[name]) for name in names) for names in self._sub_groups()]

    def _sub_groups(self) -> list[list[str]]:
        return [[s.name for s in flat.segments if s.name is not None] for flat in self.flats[0]]

    def _whole_optimizer(self) -> dict[str, Any]:
        """ZeRO-0's, by index of the parameter."""
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        for group in self.groups:
            first = sum(len(known["params"]) for known in groups)
            groups.append({**group.values, "params": list(range(first, first + len(group.names)))})
            for index, name in enumerate(group.names, first):
                tensors = {s: self.whole(name, s, self.dtype_of(name, s), True) for s in self._states(name)}
                if held := {**tensors, **_own(group.numbers[name])}:
                    state[index] = held
        return {"state": state, "param_groups": groups}

    def _states(self, name: str) -> Sequence[str]:
        return self.parameters[name].states[1:]

    # -- ucp.json -----------------------------------------------------------------------------------------------

    def manifest(self, files: dict[str, FileInfo]) -> Manifest:
        """Raises DigestMismatchError where what was written is not what was once saved."""
        known, stage = self.source.manifest, self.target.zero_stage
        for (name, state), digest in self.digests.items():
            require_saved(self.source, name, state, digest)
        return replace(
            known,
            topology=Topology(dp_size=self.target.dp_size),
            zero_stage=stage,
            digests={n: {s: self.digests[n, s].hex() for s in info.states} for n, info in self.parameters.items()},
            files=dict(sorted(files.items())),
            zero0_order=[] if stage else [[name for group in self.groups for name in group.names]],
            zero3_order=[self._sub_groups()] if stage == 3 else [],
            fragments=self._fragments() if stage in (1, 2) else {},
            unverified=f"made from {self.source.folder.name}: {known.doubt}" if known.doubt else "",
            format_version=FORMAT_VERSION,
        )

    def _fragments(self) -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {}
        for rank, flats in enumerate(self.flats):
            for flat in flats:
                for name, (offset, numel) in flat.table().items():
                    found.setdefault(name, []).append([0, rank, flat.group, offset, numel])
        return found


def aliases(content: Mapping[str, Any], manifest: Manifest) -> dict[str, str]:
    """Other names of weights -> the name under which they are parameters. ZeRO-0 lists none: there they are the names
    in "module" whose values lie where a parameter's do."""
    if content.get("shared_params") is not None:
        return dict(content["shared_params"])
    module = content["module"]
    at = {place_of(module[name]): name for name, info in manifest.parameters.items() if info.layout.numel}
    held = {name: value for name, value in module.items() if is_tensor(value) and value.numel()}
    return {name: at[p] for name, value in held.items() if (p := place_of(value)) in at and at[p] != name}


def _own(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A step that two parameters shared in the file would be counted twice by who loads it."""
    return {key: copy.copy(as_stored(value)) if is_tensor(value) else value for key, value in numbers.items()}
