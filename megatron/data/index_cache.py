"""Keep built sample indices on disk, for many processes that want the same one at the same moment.

A file's name is the hash of everything its content depends on (the token counts of the documents
themselves, not the time stamp of the data file), so a stale index cannot be found, and whoever builds an index
builds the same bytes. A file is renamed into place when complete and checked by checksum when opened; one that
is damaged is built again.

    index = cached_sample_index(folder, "train", sizes, (0, 1871), num_samples, seq_length, seed)

The processes of one machine take turns by a file lock, so that one builds and the others read. Where locks do
not work (some network file systems), each builds and renames the same bytes, which is only slower.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron.data.errors import IndexCacheError
from megatron.data.sample_index import SampleIndex, build_sample_index

logger = logging.getLogger(__name__)

MAGIC = b"GPTIDX01"
_FIXED = struct.Struct("<8sQ")  # magic, length of the JSON header
_ALIGN = 64
_ARRAYS = ("document_index", "sample_index", "shuffle_index")
_CHUNK = 1 << 24


def cached_sample_index(
    folder: str | Path,
    part: str,
    sizes: np.ndarray,
    documents: tuple[int, int],
    num_samples: int,
    seq_length: int,
    seed: int,
) -> CachedSampleIndex:
    """The index from `folder`, built and written there first if need be. Local: no communication.

    Raises IndexCacheError when the folder cannot be written.
    """
    key = index_key(sizes, documents, num_samples, seq_length, seed)
    path = Path(folder) / f"{part}-{key}.index"
    index = _open_or_warn(path, key)
    if index is not None:
        return index
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(Path(folder) / "build.lock"):
            index = _open_or_warn(path, key)
            if index is None:
                write_index(path, key, build_sample_index(sizes, documents, num_samples, seq_length, seed))
                index = open_index(path, key)
    except OSError as error:
        raise IndexCacheError(
            "the index cache cannot be written",
            found=f"{type(error).__name__}: {error}",
            expected="a folder that can be written, with space",
            where=folder,
            do="name another folder with --data-cache-path",
        ) from error
    return index


def index_key(sizes: np.ndarray, documents: tuple[int, int], num_samples: int, seq_length: int, seed: int) -> str:
    """Hash of all that the index depends on."""
    digest = hashlib.blake2b(digest_size=16)
    values = [MAGIC.decode(), *documents, num_samples, seq_length, seed]
    digest.update(json.dumps([str(value) for value in values]).encode())
    digest.update(np.ascontiguousarray(sizes[documents[0] : documents[1]], dtype="<i4"))
    return digest.hexdigest()


class CachedSampleIndex(SampleIndex):
    """A SampleIndex whose arrays are a mapped file. Pickles as the file's name."""

    def __init__(self, path: Path, key: str, arrays: dict[str, np.ndarray]):
        super().__init__(**arrays)
        object.__setattr__(self, "_source", (str(path), key))

    def __reduce__(self):
        return open_index, self._source


def write_index(path: Path, key: str, index: SampleIndex) -> None:
    """Under a temporary name, synced, then renamed: the name `path` never stands for half a file."""
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in _ARRAYS}
    entries, offset = [], 0
    for name, array in arrays.items():
        entry = {"name": name, "dtype": array.dtype.str, "shape": array.shape, "offset": offset}
        entries.append(entry | {"crc32": _crc32(array)})
        offset = _aligned(offset + array.nbytes)
    header = json.dumps({"key": key, "arrays": entries}).encode()
    start = _aligned(_FIXED.size + len(header))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(_FIXED.pack(MAGIC, len(header)) + header)
            for entry, array in zip(entries, arrays.values(), strict=True):
                file.seek(start + entry["offset"])
                array.tofile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_index(path: str | Path, key: str) -> CachedSampleIndex:
    """Map the file and check it, every byte. Raises IndexCacheError if it is not what `key` names."""
    path = Path(path)
    try:
        raw = np.memmap(path, np.uint8, mode="r")
        arrays = _checked_arrays(raw, key)
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, struct.error, OSError) as error:
        raise IndexCacheError(
            "an index cache file is damaged",
            found=str(error),
            expected=f"the complete index {key}",
            where=path,
            do="remove the file; it will be built again",
        ) from error
    return CachedSampleIndex(path, key, arrays)


def _open_or_warn(path: Path, key: str) -> CachedSampleIndex | None:
    try:
        return open_index(path, key)
    except FileNotFoundError:
        return None
    except IndexCacheError as error:
        logger.warning("%s\n  building it again", error)
        return None


def _checked_arrays(raw: np.ndarray, key: str) -> dict[str, np.ndarray]:
    magic, header_bytes = _FIXED.unpack(bytes(raw[: _FIXED.size]))
    if magic != MAGIC:
        raise ValueError(f"first bytes {magic!r}")
    header = json.loads(bytes(raw[_FIXED.size : _FIXED.size + header_bytes]))
    if header["key"] != key:
        raise ValueError(f"index of another key, {header['key']}")
    start = _aligned(_FIXED.size + header_bytes)
    arrays = {}
    for entry in header["arrays"]:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        offset = start + entry["offset"]
        num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if offset + num_bytes > len(raw):
            raise ValueError(f"{len(raw)} bytes, but {entry['name']} ends at {offset + num_bytes}")
        array = raw[offset : offset + num_bytes].view(dtype).reshape(shape)
        if _crc32(array) != entry["crc32"]:
            raise ValueError(f"{entry['name']} does not match its checksum")
        arrays[entry["name"]] = array
    if set(arrays) != set(_ARRAYS):
        raise ValueError(f"arrays {sorted(arrays)}")
    return arrays


def _crc32(array: np.ndarray) -> int:
    flat = array.reshape(-1).view(np.uint8)
    crc = 0
    for start in range(0, len(flat), _CHUNK):
        crc = zlib.crc32(flat[start : start + _CHUNK], crc)
    return crc


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock that the system drops when the holder dies, whichever way."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("no file lock on %s (%s): every process builds its own index", path, error)
        yield
