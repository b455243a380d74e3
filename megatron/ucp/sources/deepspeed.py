"""Source: the files DeepSpeed writes for ZeRO-0 to 3, BF16_Optimizer and pipelines, with the ucp.json beside them.

ZeRO concatenates the tensor-parallel shards of a parameter group and gives every rank one interval; each
file says in `param_slice_mappings` which parameters it has and where, in the order of the ranks. The start inside the
shard is the running sum over ranks. The layout turns shard intervals into runs.

    source = DeepSpeedSource(folder, read_manifest(folder))

ZeRO-0 keeps whole shards: weights by name ("module", or layer files in a pipeline), optimizer state by index, which
`manifest.zero0_order` names. ZeRO-3 cuts every parameter by itself, in the order of `manifest.zero3_order`. Frozen
parameters lie with the weights, under ZeRO-3 cut likewise, in each rank's model states.

Expert-parallel ranks are ZeRO ranks that hold different experts under the same names: a file's ZeRO rank says which.
What ZeRO does not partition lies in a file of its own for each of them.

Sources of these conventions: deepspeed/runtime/zero/stage_1_and_2.py (state_dict, _create_param_mapping), stage3.py
(_rigid_state_dict), runtime/bf16_optimizer.py, runtime/engine.py (_get_rank_zero_ckpt_name), runtime/pipe/module.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.ucp.errors import CorruptFileError, ManifestError, SourceError, listed
from megatron.ucp.expert_labels import experts_of_shard
from megatron.ucp.layout import Layout, ShardRank
from megatron.ucp.manifest import Manifest
from megatron.ucp.runs import Runs, clip_local, shard_runs
from megatron.ucp.sources.deepspeed_files import find_files
from megatron.ucp.sources.flat_states import FlatStates, Fragment, Fragments, append_fragment
from megatron.ucp.sources.one_save import require_one_save
from megatron.ucp.sources.optimizer_file import OptimizerFile
from megatron.ucp.sources.source import FileCache, Piece, listed_beside
from megatron.ucp.stored import StoredTensor
from megatron.ucp.topology import Topology

FROZEN = "frozen_param_fragments"
DEALT = "ds_autoep_layers"
"""What makes DeepSpeed's own converter stop where experts are dealt to ranks."""


def shard_number(topology: Topology, mp_rank: int, ep_rank: int = 0) -> int:
    return mp_rank + topology.pp_size * topology.tp_size * ep_rank


class DeepSpeedSource:
    """Opens lazily; the file table is checked at once, and all missing files are named together.

    `corrections` are believed instead of what the files' own tables say of these parameters."""

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        corrections: Fragments | None = None,
        cache: FileCache | None = None,
    ):
        self.folder, self.manifest = Path(folder), manifest
        self._cache = cache or FileCache()
        self._corrections = corrections or {}
        self._fragments: Fragments | None = None
        self._shard_runs: dict[tuple[Layout, ShardRank, bool | None], Runs] = {}
        if manifest.zero_stage == 3 and not manifest.zero3_order:
            raise ManifestError("ZeRO-3 without zero3_order", where=folder, do="use another checkpoint")
        self.files = find_files(self.folder, manifest)

    def require_one_save(self) -> None:
        """For want of a table of files: are they of one save, by what they say? Opens every file."""
        require_one_save(self.folder, self._cache, self.files, self.manifest.topology.tp_size)

    def fragments(self) -> Fragments:
        """Of every trainable parameter. Raises SourceError where they and the manifest disagree."""
        if self._fragments is None:
            if self.manifest.zero_stage == 3:
                fragments = self._stage3_fragments()
            else:
                fragments = self._listed_fragments() if self.manifest.fragments else self._own_tables()
            fragments |= self._corrections
            _check_names(self.manifest, fragments)
            self._fragments = fragments
        return self._fragments

    @cached_property
    def flat_states(self) -> FlatStates:
        """How the optimizer's own tensors lie beside the flat ones."""

        def num_held(fragment: Fragment, state: str) -> int:
            return self._cache.tensor(fragment.file, self._first.key(fragment.group, state)).numel()

        def flat_sizes(fragment: Fragment) -> tuple[int, ...]:
            return self._flat_sizes(fragment.file, fragment.group)

        def is_muon(fragment: Fragment) -> bool:
            return self._optimizer(fragment.file).is_muon(fragment.group)

        return FlatStates(self.fragments(), num_held, flat_sizes, is_muon)

    def step(self, name: str) -> float | None:
        return _find(self.manifest, name, "fp32").step

    def pieces(self, name: str, state: str) -> list[Piece]:
        info = _find(self.manifest, name, state)
        layout = info.layout_of(state)
        ranks = shard_ranks(self.manifest.topology, layout)
        pieces: list[Piece] = []
        for index, pp in enumerate(sorted(info.pp_stages)):
            for number, rank in enumerate(ranks):
                copy = index * len(ranks) + number
                for file, key, offset, start, stop in self._holders(name, state, pp, rank):
                    if layout.is_averaged or index:
                        pieces.append(Piece(file, key, self._runs(layout, rank, None, start, stop), offset, copy))
                        continue
                    pieces.append(Piece(file, key, self._runs(layout, rank, True, start, stop), offset))
                    if rank.tp_rank:  # tp rank 0 owns all it holds
                        replica = self._runs(layout, rank, False, start, stop)
                        pieces.append(Piece(file, key, replica, offset, copy))
        return [piece for piece in pieces if len(piece.runs)]

    def tensor(self, piece: Piece) -> StoredTensor:
        values = self._cache.tensor(piece.file, piece.key)
        if self.manifest.is_partitioned and not self._has_own_tables and len(piece.key) > 3:  # a state beside a flat
            expected = self._flat_sizes(piece.file, int(piece.key[-2]))
            if values.numel() not in expected:
                raise CorruptFileError(
                    f"the optimizer's {piece.key[-1]} is not as long as the masters beside it",
                    found=f"{values.numel()} elements in group {piece.key[-2]}",
                    expected=expected[0],
                    where=piece.file,
                    do="run `python -m megatron.ucp verify` on the folder and use another checkpoint",
                )
        return values

    @property
    def _has_own_tables(self) -> bool:
        """Every file is opened to find what it holds, and its states need not lie as its masters do."""
        return self.manifest.zero_stage < 3 and self.manifest.is_partitioned and not self.manifest.fragments

    def step_object(self, name: str) -> Any:
        info = _find(self.manifest, name, "fp32")
        mp_rank = self.manifest.topology.mp_rank(pp=min(info.pp_stages), tp=0)
        if not info.is_trainable:
            return None
        if not self.manifest.is_partitioned:
            state = self._cache.load(self.files.model(mp_rank))["optimizer"]["state"]
            return state.get(self.manifest.zero0_order[mp_rank].index(name), {}).get("step")
        fragments = self.fragments().get((name, mp_rank))
        if not fragments:
            return None
        return self._optimizer(fragments[0].file).state(fragments[0].group).get("step")

    def side_files(self) -> dict[str, Any]:
        files = {}
        for (zero_rank, mp_rank), path in self.files.models.items():
            if zero_rank:
                continue
            content = dict(self._cache.load(path))
            # Weights and optimizer state are in zero/; DeepSpeed's universal loader asks only for the rest.
            content["module"], content["optimizer"] = {}, None
            content.pop(DEALT, None)  # no longer so
            if FROZEN in content:
                content[FROZEN] = None
            files[f"mp_rank_{mp_rank:02d}_model_states.pt"] = content
        if self.manifest.is_partitioned:
            version = self._cache.load(self._first.path).get("ds_version")
            optimizer = {"ds_version": version} | self._first.of_no_parameter()
            # `elastic_checkpoint` saves no group's values: the groups are named, so that the states are loaded.
            groups = self._first.param_groups() or [{"params": [i]} for i in range(len(self._first.states()))]
        else:
            content = self._cache.load(self.files.model(0))
            groups = content["optimizer"]["param_groups"]
            optimizer = {"zero_stage": 0, "ds_version": content.get("ds_version")}
        files["zero/optimizer_state.pt"] = {**optimizer, "param_groups": groups}
        return files

    def other_files(self) -> dict[str, Path]:
        return listed_beside(self.folder, self.manifest)

    def _runs(self, layout: Layout, rank: ShardRank, owned: bool | None, start: int, stop: int | None) -> Runs:
        """shard_runs, with the whole shard's kept: many ZeRO ranks and many layers ask for parts of the same one."""
        key = layout, rank, owned
        whole = self._shard_runs.get(key)
        if whole is None:
            whole = self._shard_runs[key] = shard_runs(layout, rank, owned=owned)
        # The very same where all of it is asked for: of a large model most parameters lie whole on one rank.
        is_whole = stop is None or (start == 0 and stop >= math.prod(layout.shard_shape(rank)))
        return whole if is_whole else clip_local(whole, start, stop)

    def _holders(self, name: str, state: str, pp: int, rank: ShardRank):
        """(file, key, offset, start, stop): who holds which part of the rank's shard on a stage."""
        topology = self.manifest.topology
        mp_rank = topology.mp_rank(pp=pp, tp=rank.tp_rank)
        info = self.manifest.parameters[name]
        if not info.is_trainable and self.manifest.zero_stage == 3:
            numel = math.prod(info.layout.shard_shape(rank))
            zero_ranks = range(rank.ep_rank, topology.zero_size, rank.ep_size)
            for index, zero_rank in enumerate(zero_ranks):
                start, stop = stage3_interval(numel, index, len(zero_ranks))
                yield self.files.models[zero_rank, mp_rank], (FROZEN, name), 0, start, stop
            return
        if not self.manifest.is_partitioned or not info.is_trainable:
            # A tied weight is in the layer file of its first stage only.
            if state != "fp32" or not self.manifest.is_pipelined or pp == min(info.pp_stages):
                yield (*self._whole(name, state, mp_rank, rank), 0, 0, None)
            return
        shard = shard_number(topology, mp_rank, rank.ep_rank)
        for f in self.fragments().get((name, shard), []):
            offset = f.offset
            if state != "fp32" and self._has_own_tables:
                offset = self.flat_states.offset(f, state, (name, shard))
            yield f.file, self._first.key(f.group, state), offset, f.start, f.stop

    def _flat_sizes(self, file: Path, group: int) -> tuple[int, ...]:
        """Of the flat tensor of masters, as it is there and with its padding, which DeepSpeed may leave out."""
        size = self._cache.tensor(file, self._first.key(group, "fp32")).numel()
        return size, size + self._optimizer(file).padding(group)

    def model_states(self, mp_rank: int, zero_rank: int = 0) -> Mapping[str, Any]:
        """Under ZeRO-3 each rank's, else one file's for all of them."""
        key = (zero_rank if self.manifest.zero_stage == 3 else 0, mp_rank)
        return self._cache.load(self.files.models[key])

    def optimizer_file(self, mp_rank: int, zero_rank: int = 0) -> OptimizerFile:
        return self._optimizer(self.files.zeros[zero_rank, mp_rank])

    def _optimizer(self, file: Path) -> OptimizerFile:
        return OptimizerFile.open(self._cache, file, self.manifest.zero_stage)

    @cached_property
    def _first(self) -> OptimizerFile:
        """The others are laid out like it, so that they need not be opened to say where their tensors are."""
        return self._optimizer(self.files.zeros[0, 0])

    def _whole(self, name: str, state: str, mp_rank: int, rank: ShardRank) -> tuple[Path, tuple[str | int, ...]]:
        if rank.ep_size > 1:
            file = self.files.experts[rank.ep_rank, mp_rank]
            return file, ("module", name) if state == "fp32" else ("optimizer", name, state)
        if state == "fp32":
            layers = self.manifest.pipeline_layers
            owners = [i for i, prefix in enumerate(layers) if prefix is not None and name.startswith(prefix + ".")]
            if self.manifest.is_pipelined:
                if not owners:
                    raise SourceError("pipeline_layers of ucp.json names no layer with this parameter", found=name)
                layer = max(owners, key=lambda i: (len(layers[i]), -i))
                return self.files.layers[layer, rank.tp_rank], (name[len(layers[layer]) + 1 :],)
            file = self.files.model(mp_rank)
            # ZeRO-2 lists frozen parameters by themselves too, whatever form the program gave to "module".
            return file, (FROZEN if name in (self._cache.load(file).get(FROZEN) or {}) else "module", name)
        order = self.manifest.zero0_order[mp_rank]
        return self.files.model(mp_rank), ("optimizer", "state", order.index(name), state)

    def _listed_fragments(self) -> Fragments:
        """From the manifest, without opening a file."""
        fragments: Fragments = {}
        try:
            for name, parts in self.manifest.fragments.items():
                for mp_rank, zero_rank, group, offset, numel in parts:
                    held = fragments.setdefault((name, self._shard(name, mp_rank, zero_rank)), [])
                    append_fragment(held, self.files.zeros[zero_rank, mp_rank], group, offset, numel)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError("malformed table of fragments", found=repr(error), where=self.folder) from error
        return fragments

    def _own_tables(self) -> Fragments:
        """From every file's own table."""
        fragments: Fragments = {}
        for (zero_rank, mp_rank), file in sorted(self.files.zeros.items()):
            for group, table in enumerate(self._optimizer(file).tables):
                for name, (offset, numel) in table.items():
                    held = fragments.setdefault((name, self._shard(name, mp_rank, zero_rank)), [])
                    append_fragment(held, file, group, offset, numel)
        return fragments

    def _stage3_fragments(self) -> Fragments:
        """From the order in the manifest."""
        topology = self.manifest.topology
        fragments: Fragments = {}
        for (zero_rank, mp_rank), file in sorted(self.files.zeros.items()):
            for group, names in enumerate(self.manifest.zero3_order[mp_rank]):
                offset = 0
                for name in names:
                    rank = self._rank(name, mp_rank % topology.tp_size, zero_rank)
                    numel = math.prod(self.manifest.parameters[name].layout.shard_shape(rank))
                    index, count = zero_rank // rank.ep_size, topology.zero_size // rank.ep_size
                    start, stop = stage3_interval(numel, index, count)
                    if stop > start:
                        key = name, shard_number(topology, mp_rank, rank.ep_rank)
                        fragments.setdefault(key, []).append(Fragment(file, group, offset, start, stop))
                    offset += -(-numel // count)
        return fragments

    def _rank(self, name: str, tp: int, zero_rank: int) -> ShardRank:
        """Of the shard of which the file of a ZeRO rank has a part. ep_size is 1 for what is not dealt to ep ranks."""
        topology = self.manifest.topology
        info = _find(self.manifest, name, "fp32")
        ep_size = topology.ep_size if info.layout.is_cut_over("ep") else 1
        return ShardRank(tp, topology.tp_size, zero_rank % ep_size, ep_size)

    def _shard(self, name: str, mp_rank: int, zero_rank: int) -> int:
        if name not in self.manifest.parameters:  # told with all others (_check_names)
            return mp_rank
        return shard_number(self.manifest.topology, mp_rank, self._rank(name, 0, zero_rank).ep_rank)


def shard_ranks(topology: Topology, layout: Layout) -> list[ShardRank]:
    """Of every shard of a parameter on one stage. ep_size is 1 for what is not dealt to ep ranks."""
    ep_size = topology.ep_size if layout.is_cut_over("ep") else 1
    return [ShardRank(tp, topology.tp_size, ep, ep_size) for ep in range(ep_size) for tp in range(topology.tp_size)]


def stage3_interval(numel: int, zero_rank: int, zero_size: int) -> tuple[int, int]:
    """ZeRO-3 cuts every parameter by itself into equal pieces; the last ones are padded, and may be nothing else."""
    length = -(-numel // zero_size)
    return min(zero_rank * length, numel), min((zero_rank + 1) * length, numel)


def _find(manifest: Manifest, name: str, state: str):
    info = manifest.parameters.get(name)
    if info is None or state not in info.states:
        raise SourceError(
            f"the checkpoint holds no {state} of {name}", expected=manifest.parameters if info is None else info.states
        )
    return info


def _check_names(manifest: Manifest, fragments: Fragments) -> None:
    """Every parameter, on every shard that should hold it, with exactly the shard's number of elements."""
    topology, faults = manifest.topology, []
    expected = set()
    for name, info in manifest.parameters.items():
        if not info.is_trainable:
            continue
        for pp in info.pp_stages:
            for rank in shard_ranks(topology, info.layout):
                mp_rank = topology.mp_rank(pp=pp, tp=rank.tp_rank)
                key = name, shard_number(topology, mp_rank, rank.ep_rank)
                expected.add(key)
                held = fragments.get(key, [])
                found = held[-1].stop if held else 0
                numel = math.prod(info.layout.shard_shape(rank))
                if found != numel:
                    files = listed({fragment.file.name for fragment in held}, 4) or "no file"
                    what = f"{name}{experts_of_shard(info.layout, rank)}"
                    faults.append(f"{what} on mp_rank {mp_rank}: {found} elements, expected {numel}; in {files}")
    faults += [
        f"{name} on mp_rank {number}: not in the manifest; in {fragments[name, number][0].file.name}"
        for name, number in set(fragments) - expected
    ]
    if faults:
        raise SourceError("the files and the manifest disagree", found=faults)
