"""Target: a universal folder that DeepSpeed's own universal loader reads, plus ucp.json.

One pass. Each (parameter, state) is gathered in atomic order into a small buffer; while it is in the
cache it is compared with its replicas, digested, checksummed and appended to its file. Nothing is
written twice, no parameter is ever whole in memory, and a digest that differs from the save's stops the conversion.

    manifest = write_universal(source, staging, num_workers=2, journal=journal, kept={})

Threads, not processes: every heavy step (copy, digest, CRC, write) runs without the GIL, and the index is shared. Keys
in the files: deepspeed/checkpoint/ds_to_universal.py (merge_tp_slices).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.ucp.digest import Digest
from megatron.ucp.errors import UcpError
from megatron.ucp.execute import pour
from megatron.ucp.inert import SubparamShape
from megatron.ucp.layout import Layout
from megatron.ucp.manifest import FORMAT_VERSION, FileInfo, Manifest
from megatron.ucp.partial_sums import PartialSums
from megatron.ucp.sources.source import Source
from megatron.ucp.stored import FLOAT32
from megatron.ucp.targets.loader_files import loader_files
from megatron.ucp.targets.other_files import copy_other_files
from megatron.ucp.targets.proof import require_saved
from megatron.ucp.topology import Topology
from megatron.ucp.torch_file import Record, StreamedTensor, save_streamed
from megatron.ucp.unfinished import Job, Journal, WrittenTensor, remove_others


class _Stopped(Exception):
    """Another worker failed; its error is the one to report."""


def tensor_bytes(manifest: Manifest) -> int:
    """Size of all states of all parameters as float32: what the output will hold."""
    return sum(4 * info.layout_of(state).numel for info in manifest.parameters.values() for state in info.states)


def write_universal(
    source: Source,
    folder: Path,
    *,
    num_workers: int = 2,
    progress: Callable[[int], None] = lambda num_bytes: None,
    sums: PartialSums | None = None,
    journal: Journal,
    kept: dict[Job, WrittenTensor],
) -> Manifest:
    """Fills `folder` with everything but ucp.json, and returns that; of what is there, the `kept` tensors stay.
    `progress` is told bytes as they are written, from several threads; `sums` takes the CRCs of what was read. The
    first failure stops the others and is raised, naming its parameter and state."""
    jobs = tensor_jobs(source.manifest)
    remove_others(folder, {tensor.path for tensor in kept.values()})
    written = write_tensors(
        source, folder, jobs, kept, journal, with_rest=True, num_workers=num_workers, progress=progress, sums=sums
    )
    return universal_manifest(source, written)


def tensor_jobs(manifest: Manifest) -> list[Job]:
    """Largest first, so that no worker is left alone with a big one at the end."""
    jobs = [(name, state) for name, info in manifest.parameters.items() for state in info.states]
    return sorted(jobs, key=lambda job: -manifest.parameters[job[0]].layout_of(job[1]).numel)


@dataclass(frozen=True)
class Written:
    files: dict[str, FileInfo]
    digests: dict[Job, str]


def write_tensors(
    source: Source,
    folder: Path,
    jobs: Sequence[Job],
    kept: dict[Job, WrittenTensor],
    journal: Journal,
    *,
    with_rest: bool,
    num_workers: int,
    progress: Callable[[int], None],
    sums: PartialSums | None,
) -> Written:
    """The files of these tensors but for those that are `kept`, and `with_rest` whatever else belongs into a universal
    folder. Raises as write_universal."""
    stop = threading.Event()
    files: dict[str, FileInfo] = {}

    def work(job: Job) -> WrittenTensor | None:
        if stop.is_set():
            return None
        if (tensor := kept.get(job)) is not None:
            progress(4 * source.manifest.parameters[tensor.name].layout_of(tensor.state).numel)
            return tensor
        tensor = _write_tensor(source, folder, *job, progress, stop, sums)
        if tensor is not None:
            journal.add(tensor)
        return tensor

    def write_rest() -> None:
        try:
            if with_rest:
                files.update(_write_side_files(source, folder))
        except BaseException:
            stop.set()
            raise

    for name in source.manifest.parameters:
        (folder / "zero" / name).mkdir(parents=True, exist_ok=True)
    if jobs:
        source.pieces(*jobs[0])  # builds the source's index once, before the threads ask for it
    with ThreadPoolExecutor(max(1, num_workers) + 1) as pool:
        rest = pool.submit(write_rest)
        futures = [pool.submit(work, job) for job in jobs]
        try:
            errors = [error for future in (*futures, rest) if (error := future.exception())]
        except BaseException:  # an interrupt: the pool waits for its workers before it lets us go
            stop.set()
            raise
    if errors:
        raise errors[0]
    written = [result for future in futures if (result := future.result())]
    files.update({w.path: w.info for w in written})
    return Written(files, {(w.name, w.state): w.digest for w in written})


def universal_manifest(source: Source, written: Written) -> Manifest:
    """The ucp.json of a folder that holds all that was written."""
    manifest = source.manifest
    return replace(
        manifest,
        kind="universal",
        topology=Topology(),
        zero_stage=0,
        is_pipelined=False,
        parameters={
            name: replace(info, layout=info.layout.without_padding(), pp_stages=(0,))
            for name, info in manifest.parameters.items()
        },
        digests={
            name: {state: written.digests[name, state] for state in info.states}
            for name, info in manifest.parameters.items()
        },
        files=dict(sorted(written.files.items())),
        zero0_order=[],
        zero3_order=[],
        fragments={},
        pipeline_layers=[],
        source={
            "folder": source.folder.name,
            "kind": manifest.kind,
            "topology": manifest.topology.to_json(),
            "zero_stage": manifest.zero_stage,
            "is_pipelined": manifest.is_pipelined,
        },
        unverified=f"converted from {source.folder.name}: {manifest.doubt}" if manifest.doubt else "",
        format_version=FORMAT_VERSION,
    )


def _write_tensor(
    source: Source,
    folder: Path,
    name: str,
    state: str,
    progress: Callable[[int], None],
    stop: threading.Event,
    sums: PartialSums | None,
) -> WrittenTensor | None:
    layout = source.manifest.parameters[name].layout_of(state)
    relative = f"zero/{name}/{state}.pt"
    try:
        digest = Digest()

        def told(num_elements: int) -> None:
            if stop.is_set():
                raise _Stopped
            progress(4 * num_elements)

        def write(record: Record) -> None:
            nonlocal digest
            digest = pour(source, name, state, record, compares_replicas=True, told=told, sums=sums)

        tensor = StreamedTensor(layout.shape, FLOAT32, write)
        info = save_streamed({**file_keys(layout, name), "param": tensor}, folder / relative)
        require_saved(source, name, state, digest)
        return WrittenTensor(name, state, info, digest.hex())
    except _Stopped:
        return None
    except UcpError:
        stop.set()
        raise
    except Exception as error:
        stop.set()
        raise UcpError(f"writing {name} ({state}) failed: {type(error).__name__}: {error}", where=folder) from error


def file_keys(layout: Layout, name: str) -> dict[str, Any]:
    """DeepSpeed's keys beside "param": how its loader is to cut the tensor for another tensor-parallel size."""
    cut = next((cut for cut in layout.cuts if cut.axis == "tp"), None)
    keys: dict[str, Any] = {}
    if cut is None:
        # DeepSpeed writes no key for replicated and averaged; what matched no list it would cut along dimension 0.
        if layout.pattern == "unique":
            keys["cat_dim"] = 0
    elif len(cut.parts) > 1:
        shape = [n if d != cut.dim else tuple(p.size for p in cut.parts) for d, n in enumerate(layout.shape)]
        sub_params = SubparamShape()
        sub_params.patterns, sub_params.shape, sub_params.partition_dim = [name], tuple(shape), cut.dim
        keys["sub_param_shape"] = sub_params
    else:
        keys["cat_dim"] = cut.dim
    if cut is not None and cut.padded is not None:
        keys["vocab_tensor"] = True
    if any(cut.axis == "ep" and cut.dim == 0 for cut in layout.cuts):
        keys |= {"is_expert_param": True, "ep_num_experts": layout.shape[0]}
    return keys


def _write_side_files(source: Source, folder: Path) -> dict[str, FileInfo]:
    """What DeepSpeed's loaders ask for, and whatever else the save had that is not a .pt file."""
    infos: dict[str, FileInfo] = {}
    for relative, content in loader_files(source).items():
        infos[relative] = save_streamed(content, folder / relative)
    return infos | copy_other_files(source, folder)
