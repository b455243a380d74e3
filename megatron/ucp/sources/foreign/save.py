"""The files of one save that has no ucp.json, all of them opened: which ranks they are of, and that none is missing.

    save = open_save(folder)                # every file opened, and all tell of one save
    save.require_complete()                 # and there is one for each rank
    save.model(0)["param_shapes"], list(save.optimizers(0))

Saves with experts are opened likewise; they say otherwise over how many ranks their dense parameters are cut (moe.py).

Source of these conventions: deepspeed/runtime/engine.py (_save_checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.ucp.errors import CorruptFileError, MissingFileError
from megatron.ucp.manifest import Manifest
from megatron.ucp.sources.deepspeed_files import Files, find_files, list_files
from megatron.ucp.sources.one_save import require_one_save
from megatron.ucp.sources.optimizer_file import OptimizerFile
from megatron.ucp.sources.source import FileCache
from megatron.ucp.topology import Topology

NO_MANIFEST = "it was saved without checksums (there was no ucp.json)"

PartitionCounts = Callable[[Mapping[str, Any], OptimizerFile], Any]
"""(model states, optimizer states) -> over how many ranks dense parameters are cut: a number, one for each group, or
None."""


@dataclass(frozen=True)
class ForeignSave:
    folder: Path
    cache: FileCache
    files: Files
    topology: Topology
    zero_stage: int

    @property
    def mp_ranks(self) -> range:
        return range(self.topology.pp_size * self.topology.tp_size)

    @property
    def is_pipelined(self) -> bool:
        return bool(self.files.layers)

    def model(self, mp_rank: int) -> Mapping[str, Any]:
        return self.cache.load(self.files.model(mp_rank))

    @cached_property
    def _optimizers(self) -> dict[tuple[int, int], OptimizerFile]:
        return {key: OptimizerFile.open(self.cache, path, self.zero_stage) for key, path in self.files.zeros.items()}

    def optimizer(self, zero_rank: int, mp_rank: int) -> OptimizerFile:
        return self._optimizers[zero_rank, mp_rank]

    def optimizers(self, mp_rank: int) -> Iterator[OptimizerFile]:
        """In the order of the ZeRO ranks."""
        return (file for (_, mp), file in self._optimizers.items() if mp == mp_rank)

    def require_complete(self) -> None:
        """Raises MissingFileError naming all that are missing, SourceError where some are of another topology."""
        find_files(self.folder, Manifest("native", self.topology, {}, zero_stage=self.zero_stage))


def open_save(folder: Path, partition_counts: PartitionCounts | None = None) -> ForeignSave:
    """Opens every file. Raises MissingFileError, CorruptFileError, or SourceError where they are not of one save."""
    cache, files = FileCache(), list_files(folder)
    if not files.models:
        raise MissingFileError("no model states (*mp_rank_*_model_states.pt)", where=folder)
    open_all(folder, cache, (*files.zeros.values(), *files.models.values(), *files.layers.values()))
    first = OptimizerFile.open(cache, files.zeros[min(files.zeros)])
    topology = _topology(cache.load(files.models[min(files.models)]), first, files, partition_counts)
    require_one_save(folder, cache, files, topology.tp_size)
    return ForeignSave(folder, cache, files, topology, first.zero_stage)


def open_all(folder: Path, cache: FileCache, paths: Iterable[Path]) -> None:
    """Raises CorruptFileError naming all that cannot be read."""
    unreadable = {}
    for path in paths:
        try:
            cache.load(path)
        except CorruptFileError as error:
            unreadable[path.name] = error
    if unreadable:
        raise CorruptFileError(
            f"{len(unreadable)} file(s) cannot be read ({min(unreadable.items())[1].what})",
            found=list(unreadable),
            where=folder,
            do="copy them again from where they were saved",
        )


def _topology(
    content: Mapping[str, Any], optimizer: OptimizerFile, files: Files, partition_counts: PartitionCounts | None
) -> Topology:
    sizes = content.get("checkpoint_parallel_dimensions") or {}
    num_mp = max(mp for _, mp in (*files.models, *files.zeros)) + 1
    tp_size = int(sizes.get("tp_degree") or content.get("mp_world_size") or num_mp)
    count = partition_counts(content, optimizer) if partition_counts else optimizer.partition_counts()
    count = count or max(z for z, _ in files.zeros) + 1
    return Topology(
        tp_size=tp_size,
        pp_size=int(sizes.get("pp_degree") or -(-num_mp // tp_size)),
        dp_size=max(count) if isinstance(count, (list, tuple)) else int(count),
    )


def common_from_model_states(content: Mapping[str, Any]) -> dict:
    """Counters that DeepSpeed and Megatron-DeepSpeed keep in mp_rank_XX_model_states.pt."""
    if not content:
        return {}
    names = ("iteration", "global_steps", "global_samples", "skipped_steps")
    common = {n: content[n] for n in names if isinstance(content.get(n), int)}
    common.setdefault("iteration", common.get("global_steps"))
    arguments = content.get("args")
    for name in ("consumed_train_samples", "consumed_valid_samples"):
        if isinstance(getattr(arguments, name, None), int):
            common[name] = getattr(arguments, name)
    return common
