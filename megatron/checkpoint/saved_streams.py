"""The file of random streams in a checkpoint: every rank's, by rank.

    save_streams(staging, states_of_all_ranks)                                   # on rank 0
    restore_streams(streams, source, iteration, is_same_topology=True)           # on each

A damaged or missing file is an error, never another stream.
"""

from __future__ import annotations

import logging
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist

from megatron.parallel.rng import RandomStreams
from megatron.ucp.disk import disk_errors
from megatron.ucp.errors import CorruptFileError
from megatron.ucp.file_table import require_listed, require_unchanged
from megatron.ucp.safe_paths import existing_file
from megatron.ucp.sources import Source

log = logging.getLogger(__name__)

RNG_FILE = "rng_state.safetensors"


def save_streams(folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
    with disk_errors(folder / RNG_FILE):
        (folder / RNG_FILE).write_bytes(streams_content(states))


def streams_content(states: list[dict[str, torch.Tensor]]) -> bytes:
    """Of the file, from every rank's states by rank."""
    return safetensors.torch.save(
        {f"rank{rank}/{key}": value for rank, state in enumerate(states) for key, value in state.items()}
    )


def restore_streams(streams: RandomStreams, source: Source, iteration: int, is_same_topology: bool) -> None:
    """Bit-equal for the same topology; otherwise reseeded from the seed and the iteration, by rule. Local. Raises
    MissingFileError, ManifestError or CorruptFileError where the file is not the one that was saved."""
    named = source.manifest.common.get("rng")
    if is_same_topology and named is not None:
        streams.load_state_dict(_saved_states(source, named["file"]))
        return
    streams.reseed(iteration)
    if is_same_topology:
        log.warning("warning: random streams start anew at iteration %d: the Source names no file of them", iteration)
    else:
        log.info("random streams start anew at iteration %d: the topology changed", iteration)


def _saved_states(source: Source, file: str) -> dict[str, torch.Tensor]:
    """This rank's."""
    require_listed(source.folder, source.manifest, [file])
    require_unchanged(source.folder, source.manifest, [file])
    path, prefix = existing_file(source.folder, file), f"rank{dist.get_rank()}/"
    try:
        with safetensors.safe_open(path, framework="pt") as tensors:
            names = [key for key in tensors.offset_keys() if key.startswith(prefix)]
            mine = {key.removeprefix(prefix): tensors.get_tensor(key) for key in names}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _damaged(path, f"not a readable safetensors file ({error})") from error
    if missing := {"host", "default", "tensor_parallel"} - set(mine):
        raise _damaged(path, f"no {sorted(missing)} of rank {dist.get_rank()}")
    if odd := [key for key, value in mine.items() if value.dtype != torch.uint8 or value.dim() != 1]:
        raise _damaged(path, f"{odd} of rank {dist.get_rank()} are no states of a generator")
    return mine


def _damaged(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(
        what, where=path, do="copy it again from where it was saved, or start the streams anew with --no-load-rng"
    )
