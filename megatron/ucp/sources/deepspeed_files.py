"""Which files DeepSpeed writes for a topology, by their names.

Numbers in names are compared as numbers, never as text, and whatever is missing or too many is named
at once.

    files = find_files(folder, manifest)
    files.zeros[zero_rank, mp_rank], files.model(mp_rank)

The names themselves are in ucp/file_names.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.ucp.errors import MissingFileError, SourceError, listed
from megatron.ucp.expert_labels import experts_clause
from megatron.ucp.file_names import DEALT_FILE, LAYER_FILE, MODEL_FILE, STAGE3_MODEL_FILE, ZERO_FILE, dealt_file
from megatron.ucp.manifest import Manifest

_MAX_MISSING = 4096
"""More are not listed one by one: the topology, a few bytes in a file, must not decide how much memory is taken."""


_Table = dict[tuple[int, int], Path]


@dataclass(frozen=True)
class Files:
    zeros: dict[tuple[int, int], Path]
    """Optimizer states by (zero rank, mp_rank), in that order; likewise the others."""
    models: dict[tuple[int, int], Path]
    """Model states; zero rank 0 only, except under ZeRO-3."""
    layers: dict[tuple[int, int], Path]
    """By (layer, tp rank)."""
    experts: dict[tuple[int, int], Path]
    """By (ep rank, mp_rank)."""

    def model(self, mp_rank: int) -> Path:
        return self.models[0, mp_rank]

    def names(self) -> list[str]:
        return [path.name for table in (self.zeros, self.models, self.layers, self.experts) for path in table.values()]


def find_files(folder: Path, manifest: Manifest) -> Files:
    """Those of the manifest's topology. Raises naming all that are missing, or all that belong to another topology."""
    topology = manifest.topology
    num_mp = topology.pp_size * topology.tp_size
    found = list_files(folder)
    is_stage3 = manifest.zero_stage == 3
    num_zero = topology.zero_size if is_stage3 or manifest.is_partitioned else 1
    dealt = _dealt_stages(manifest)
    num_experts = topology.ep_size * len(dealt) * topology.tp_size
    num_found = max(len(found.zeros), len(found.models))
    if num_zero * num_mp > num_found + _MAX_MISSING or num_experts > len(found.experts) + _MAX_MISSING:
        raise MissingFileError(
            f"more than {_MAX_MISSING} files of the checkpoint are missing",
            found=f"{len(found.zeros)} files of optimizer states, {len(found.models)} of model states, "
            f"{len(found.experts)} of experts",
            expected=f"{max(num_zero * num_mp, num_experts)}: one per rank of {topology}, ZeRO-{manifest.zero_stage}",
            where=folder,
            do="bring the files of every node into this folder",
        )
    every_rank = {(z, mp) for z in range(num_zero) for mp in range(num_mp)}
    zeros = every_rank if manifest.is_partitioned else set()
    models = every_rank if is_stage3 else {(0, mp) for mp in range(num_mp)}
    prefix = "zero_pp_rank_{}_mp_rank_{:02d}" if is_stage3 else "mp_rank_{1:02d}"
    missing = [f"{prefix.format(z, mp)}_model_states.pt" for z, mp in models - set(found.models)]
    missing += [f"*zero_pp_rank_{z}_mp_rank_{mp:02d}_optim_states.pt" for z, mp in zeros - set(found.zeros)]
    has_frozen = any(not info.is_trainable for info in manifest.parameters.values())
    if manifest.is_pipelined and (has_frozen or not manifest.is_partitioned):
        layers = {(i, tp) for i, p in enumerate(manifest.pipeline_layers) if p for tp in range(topology.tp_size)}
        missing += [f"layer_{i:02d}-model_{tp:02d}-model_states.pt" for i, tp in layers - set(found.layers)]
    missing += _missing_expert_files(manifest, dealt, found)
    if missing:
        raise MissingFileError(
            f"{len(missing)} file(s) of the checkpoint are missing",
            found=f"missing: {listed(missing)}{experts_clause(manifest, missing)}",
            expected=f"one file per rank of {topology}, ZeRO-{manifest.zero_stage}",
            where=folder,
            do="bring the files of every node into this folder",
        )
    foreign = [found.zeros[key].name for key in set(found.zeros) - zeros]
    foreign += [found.models[key].name for key in set(found.models) - models]
    if foreign:
        raise SourceError(
            "files of another topology lie in the folder",
            found=foreign,
            expected=f"{topology}, ZeRO-{manifest.zero_stage}",
            where=folder,
        )
    return found


def _dealt_stages(manifest: Manifest) -> set[int]:
    """Pipeline stages whose experts lie in files of their ep ranks, not in those of ZeRO's partitions."""
    if manifest.topology.ep_size == 1 or manifest.zero_stage == 3:
        return set()
    dealt = [info for info in manifest.parameters.values() if info.layout.is_cut_over("ep")]
    return {pp for info in dealt if not (manifest.is_partitioned and info.is_trainable) for pp in info.pp_stages}


def _missing_expert_files(manifest: Manifest, stages: set[int], found: Files) -> list[str]:
    topology = manifest.topology
    needed = {
        (ep, topology.mp_rank(pp=pp, tp=tp))
        for ep in range(topology.ep_size)
        for pp in stages
        for tp in range(topology.tp_size)
    }
    return [dealt_file(ep, mp) for ep, mp in sorted(needed - set(found.experts))]


def list_files(folder: Path) -> Files:
    """DeepSpeed's files in the folder. Raises SourceError where two are of the same rank."""
    zeros: _Table = {}
    models: _Table = {}
    stage3: _Table = {}
    layers: _Table = {}
    experts: _Table = {}
    doubled: list[str] = []
    for path in folder.iterdir():
        for pattern, table in (
            (ZERO_FILE, zeros),
            (MODEL_FILE, models),
            (STAGE3_MODEL_FILE, stage3),
            (LAYER_FILE, layers),
            (DEALT_FILE, experts),
        ):
            if match := pattern.match(path.name):
                first, *second = (int(number or 0) for number in match.groups())
                key = (first, second[0]) if second else (0, first)
                if key in table:
                    doubled += [table[key].name, path.name]
                table[key] = path
    if doubled:
        raise SourceError(
            "several files are of the same rank",
            found=doubled,
            where=folder,
            do="a folder holds one save: move the files of the others away",
        )
    return Files(*(dict(sorted(table.items())) for table in (zeros, stage3 or models, layers, experts)))
