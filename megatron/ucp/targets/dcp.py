"""Target: a PyTorch DCP folder, model and optimizer by the names of an architecture of Hugging Face's.

digests = write_dcp(source, staging, pairs_in_memory(family, model), FLOAT32, num_workers=2)

Under "model.NAME" the weights, under "optim.state.NAME.STATE" all states and the step, under
"optim.param_groups.NAME.KEY" the hyper-parameters of each parameter's group: what get_state_dict gives with
StateDictOptions(flatten_optimizer_state_dict=True), so that dcp.load fills an FSDP2 program's. Planned and committed by
torch's own `save`; each tensor is made when it is written, so that no more than one a worker is ever whole in memory.
Source: torch/distributed/checkpoint/planner.py, filesystem.py, metadata.py (2.13).
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner, save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron.ucp.digest import Digest, digest_runs
from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.execute import gather
from megatron.ucp.huggingface.families import Family
from megatron.ucp.naming.gpt_model import GptModel
from megatron.ucp.naming.tensors import Pair, pairs
from megatron.ucp.runs import Runs, whole_runs
from megatron.ucp.sources.source import Source
from megatron.ucp.stored import DType, in_order
from megatron.ucp.targets.proof import require_saved

MASTER, _EMBEDDING, _TIED = "fp32", "embedding.word_embeddings.weight", "lm_head.weight"


@dataclass(frozen=True)
class _Entry:
    """One key of the folder: a tensor that is made of ours, a number, or another value."""

    path: tuple[str, ...]
    pair: Pair | None = None
    state: str = ""
    dtype: torch.dtype = torch.float32
    value: Any = None
    is_alias: bool = False
    """Another name of what is written already."""

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def is_tensor(self) -> bool:
        return self.pair is not None or isinstance(self.value, torch.Tensor)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.pair.shape if self.pair else ())

    @property
    def index(self) -> MetadataIndex:
        return (
            MetadataIndex(self.key, torch.Size([0] * len(self.shape)), 0) if self.is_tensor else MetadataIndex(self.key)
        )

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([0] * len(self.shape)), sizes=self.shape)

    @property
    def properties(self) -> TensorProperties:
        return TensorProperties(dtype=self.dtype)


def pairs_in_memory(family: Family, model: GptModel) -> list[Pair]:
    """By the names that transformers' models have, which are not quite those of its files; a tied output layer, which
    such programs keep too, stands last."""
    found = pairs(family, model, has_whole_experts=bool(family.whole_experts))
    head = f"{family.lm_head}."
    found = [
        replace(pair, name=f"lm_head.{pair.name.removeprefix(head)}") if pair.name.startswith(head) else pair
        for pair in found
    ]
    if not model.untie_embeddings_and_output_weights:
        found.append(replace(next(pair for pair in found if pair.ours == _EMBEDDING), name=_TIED))
    return found


def bytes_of(source: Source, of_model: Sequence[Pair], dtype: DType) -> int:
    """Of all tensors."""
    states = {name: len(info.states) - 1 for name, info in source.manifest.parameters.items()}
    return sum(math.prod(pair.shape) * (dtype.itemsize + 4 * states[pair.ours]) for pair in of_model)


def write_dcp(
    source: Source,
    folder: Path,
    of_model: Sequence[Pair],
    dtype: DType,
    *,
    num_workers: int = 2,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> dict[str, dict[str, str]]:
    """All but the folder's name; returns the digests of our parameters' states. `dtype`: of the weights, moments are
    in fp32. `progress` is told bytes as tensors are made, from several threads. Raises UnsupportedCheckpointError for a
    state that is not of its parameter's shape, DigestMismatchError where one is not what was saved, and what reading
    raises."""
    weights: torch.dtype = getattr(torch, dtype.name)
    planner = _Planner(source, list(_entries(source, of_model, weights)), progress)
    try:
        save({}, storage_writer=_Writer(folder, max(1, num_workers)), planner=planner, no_dist=True)
    except BaseException:  # torch's CheckpointException, which hides what was wrong, is no Exception
        if planner.errors:
            raise planner.errors[0] from None
        raise
    for (name, state), digest in planner.digests.items():
        require_saved(source, name, state, digest)
    digests: dict[str, dict[str, str]] = {}
    for (name, state), digest in planner.digests.items():
        digests.setdefault(name, {})[state] = digest.hex()
    return digests


def _entries(source: Source, of_model: Sequence[Pair], weights: torch.dtype) -> Iterator[_Entry]:
    parameters, groups = source.manifest.parameters, source.manifest.optimizer.groups
    if odd := sorted({f"{name} ({state})" for name, info in parameters.items() for state in info.shapes}):
        raise UnsupportedCheckpointError(
            "states of another shape than their parameter's have no place there", found=odd, where=source.folder
        )
    for pair in of_model:
        info = parameters[pair.ours]
        is_alias = pair.ours == _EMBEDDING and pair.name == _TIED
        yield _Entry(("model", pair.name), pair, MASTER, weights, is_alias=is_alias)
        if is_alias:
            continue
        state = ("optim", "state", pair.name)
        for key in info.states:
            if key != MASTER:
                yield _Entry((*state, key), pair, key)
        numbers: Mapping[str, float] = {**info.scalars, **({} if info.step is None else {"step": info.step})}
        for key, number in numbers.items():
            yield _Entry((*state, key), value=torch.tensor(float(number)))
        if len(info.states) > 1:
            for key, value in groups.get(info.group, {}).items():
                yield _Entry(("optim", "param_groups", pair.name, key), value=value)


class _Planner(SavePlanner):
    """What there is to write, and each of it when the writer asks."""

    def __init__(self, source: Source, entries: list[_Entry], progress: Callable[[int], None]):
        self.source, self.progress = source, progress
        self.entries = {entry.key: entry for entry in entries}
        self.digests: dict[tuple[str, str], Digest] = {}
        self.errors: list[BaseException] = []
        """The first says why."""
        self._lock = threading.Lock()

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_item(entry) for entry in self.entries.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        kinds: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            key: TensorStorageMetadata(entry.properties, entry.shape, [entry.chunk])
            if entry.is_tensor
            else BytesStorageMetadata()
            for key, entry in self.entries.items()
        }
        return all_plans, Metadata(kinds, {key: entry.path for key, entry in self.entries.items()})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        entry = self.entries[write_item.index.fqn]
        try:
            if entry.pair is not None:
                return self._made(entry, entry.pair)
            if entry.is_tensor:
                return entry.value
            content = io.BytesIO()
            torch.save(entry.value, content)
            return content
        except BaseException as error:
            with self._lock:
                self.errors.append(error)
            raise

    def _made(self, entry: _Entry, pair: Pair) -> torch.Tensor:
        ours = self.source.manifest.parameters[pair.ours].layout
        # A transposed matrix is all of our parameter, which is turned afterwards.
        runs: Runs = whole_runs(ours.numel) if pair.is_transposed else pair.runs
        values = np.empty(math.prod(pair.shape), dtype=np.float32)
        gather(self.source, pair.ours, entry.state, self.source.pieces(pair.ours, entry.state), runs, values)
        digest = digest_runs(values, runs, name=pair.ours, state=entry.state, shape=ours.shape)
        with self._lock:
            key = pair.ours, entry.state
            if not entry.is_alias:
                self.digests[key] = self.digests.get(key, Digest()) + digest
        self.progress(values.size * entry.dtype.itemsize)
        shaped = in_order(values.reshape(pair.shape[::-1]).T) if pair.is_transposed else values.reshape(pair.shape)
        return torch.from_numpy(shaped).to(entry.dtype)


class _Writer(FileSystemWriter):
    """Torch's keeps all tensors of a file until it closes it (2.13); this one lets each go when it is written."""

    def __init__(self, folder: Path, num_workers: int):
        super().__init__(folder)
        self._folder, self._num_workers = folder, num_workers

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        stop = threading.Event()

        def work(number: int, items: list[WriteItem]) -> list[WriteResult]:
            try:
                with open(self._folder / f"__0_{number}.distcp", "wb") as file:
                    return [_written(item, planner, file) for item in items if not stop.is_set()]
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(self._num_workers) as pool:
            futures = [pool.submit(work, number, items) for number, items in enumerate(self._shares(plan.items))]
            try:
                results = [result for future in futures for result in future.result()]
            except BaseException:
                stop.set()
                raise
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def _shares(self, items: Sequence[WriteItem]) -> list[list[WriteItem]]:
        """One file for each worker, about as large as the others."""
        shares: list[list[WriteItem]] = [[] for _ in range(self._num_workers)]
        sizes = [0] * self._num_workers
        for item in sorted(items, key=lambda item: -(item.tensor_storage_size() or 0)):
            least = sizes.index(min(sizes))
            shares[least].append(item)
            sizes[least] += item.tensor_storage_size() or 0
        return [share for share in shares if share]


def _written(item: WriteItem, planner: SavePlanner, file: BinaryIO) -> WriteResult:
    start = file.tell()
    value = planner.resolve_data(item)
    if isinstance(value, io.BytesIO):
        file.write(value.getbuffer())
    else:
        torch.save(value, file)
    length = file.tell() - start
    return WriteResult(item.index, length, _StorageInfo(Path(file.name).name, start, length))


def _item(entry: _Entry) -> WriteItem:
    if not entry.is_tensor:
        return WriteItem(entry.index, WriteItemType.BYTE_IO)
    return WriteItem(
        entry.index, WriteItemType.TENSOR, tensor_data=TensorWriteData(entry.chunk, entry.properties, entry.shape)
    )
