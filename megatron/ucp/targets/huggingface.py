"""Target: a Hugging Face model folder, its weights in .safetensors written front to back from any Source.

Their tensors are made while they are written, in stretches, so that no more than a transposed one is ever
whole in memory; the digest of each of our parameters comes out of the same pass and is held against the one that was
saved.

    shards = shards_of(pairs(family, model), BFLOAT16, max_bytes=5 << 30)
    digests = write_weights(source, staging, shards, BFLOAT16, num_workers=2)
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.ucp.digest import Digest, digest_runs
from megatron.ucp.errors import UcpError
from megatron.ucp.execute import gather, pour, rounded
from megatron.ucp.naming.tensors import Pair
from megatron.ucp.runs import whole_runs
from megatron.ucp.safetensors_file import write_safetensors
from megatron.ucp.sources.source import Source
from megatron.ucp.stored import DType, in_order
from megatron.ucp.targets.proof import require_saved
from megatron.ucp.torch_file import Record, StreamedTensor

MASTER = "fp32"
INDEX = "model.safetensors.index.json"
_METADATA = {"format": "pt"}
"""Without which transformers does not load a file."""


@dataclass(frozen=True)
class Shard:
    file: str
    pairs: tuple[Pair, ...]
    num_bytes: int


class _Stopped(Exception):
    """Another worker failed; its error is the one to report."""


def shards_of(pairs: Sequence[Pair], dtype: DType, max_bytes: int) -> list[Shard]:
    """In order, each of at most `max_bytes` or of one tensor."""
    groups: list[list[Pair]] = []
    size = 0
    for pair in pairs:
        num_bytes = math.prod(pair.shape) * dtype.itemsize
        if not groups or size + num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(pair)
        size += num_bytes
    total = len(groups)
    return [
        Shard(
            "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors",
            tuple(group),
            sum(math.prod(pair.shape) * dtype.itemsize for pair in group),
        )
        for number, group in enumerate(groups, start=1)
    ]


def write_weights(
    source: Source,
    folder: Path,
    shards: Sequence[Shard],
    dtype: DType,
    *,
    num_workers: int = 2,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> dict[str, dict[str, str]]:
    """The shards and, of more than one, their index; returns the digests of our parameters. Each worker has a shard at
    a time. `progress` is told bytes as they are written, from several threads. The first failure stops the others and
    is raised; DigestMismatchError where a parameter is not what was saved."""
    stop = threading.Event()
    digests: dict[str, Digest] = {}
    lock = threading.Lock()

    def told(num_elements: int) -> None:
        if stop.is_set():
            raise _Stopped
        progress(num_elements * dtype.itemsize)

    def streamed(pair: Pair) -> StreamedTensor:
        def write(record: Record) -> None:
            digest = _write(source, pair, record, dtype, told)
            with lock:
                digests[pair.ours] = digests.get(pair.ours, Digest()) + digest

        return StreamedTensor(pair.shape, dtype, write)

    def work(shard: Shard) -> None:
        try:
            write_safetensors(folder / shard.file, {pair.name: streamed(pair) for pair in shard.pairs}, _METADATA)
        except _Stopped:
            return
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        futures = [pool.submit(work, shard) for shard in shards]
        try:
            errors = [error for future in futures if (error := future.exception())]
        except BaseException:  # an interrupt: the pool waits for its workers before it lets us go
            stop.set()
            raise
    if errors:
        raise errors[0]
    for name, digest in digests.items():
        require_saved(source, name, MASTER, digest)
    if len(shards) > 1:
        (folder / INDEX).write_text(json.dumps(_index(shards), indent=2) + "\n")
    return {name: {MASTER: digest.hex()} for name, digest in digests.items()}


def _index(shards: Sequence[Shard]) -> Mapping[str, object]:
    files = {pair.name: shard.file for shard in shards for pair in shard.pairs}
    return {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": files}


def _write(source: Source, pair: Pair, record: Record, dtype: DType, told: Callable[[int], None]) -> Digest:
    """One tensor, in its own order; the digest of its elements where they lie in ours."""
    try:
        if pair.is_transposed:
            return _write_transposed(source, pair, record, dtype, told)
        digest = Digest()
        for start, _, length in pair.runs[np.argsort(pair.runs[:, 1])].tolist():
            digest += pour(source, pair.ours, MASTER, record, start, start + length, dtype=dtype, told=told)
        return digest
    except (_Stopped, UcpError, OSError):
        raise
    except Exception as error:
        raise UcpError(f"writing {pair.name} failed: {type(error).__name__}: {error}", where=source.folder) from error


def _write_transposed(source: Source, pair: Pair, record: Record, dtype: DType, told: Callable[[int], None]) -> Digest:
    shape = source.manifest.parameters[pair.ours].layout.shape
    numel = math.prod(shape)
    values = np.empty(numel, dtype=np.float32)
    runs = whole_runs(numel)
    gather(source, pair.ours, MASTER, source.pieces(pair.ours, MASTER), runs, values)
    digest = digest_runs(values, runs, name=pair.ours, state=MASTER, shape=shape)
    record.write(in_order(rounded(values, dtype).reshape(shape).T))
    told(numel)
    return digest
