"""Read and write Megatron's memory-mapped token files: PREFIX.bin with tokens, PREFIX.idx with where they lie.

The .idx is the commit marker. It is renamed into place last, so a pair either is whole or is
not there, and opening a pair first checks that every byte the .idx speaks of exists.

    with IndexedDatasetWriter("corpus_text_document", np.uint16) as writer:
        writer.add_document([15496, 995, 50256])
    tokens = IndexedDataset("corpus_text_document")[0]

Layout of the .idx (little endian), as Megatron-LM's megatron/data/indexed_dataset.py writes it:

    9 bytes  b"MMIDIDX\\0\\0"        8 bytes  version = 1        1 byte  dtype code
    8 bytes  n = number of sequences                 8 bytes  m = entries of the document index
    n int32  tokens per sequence     n int64  byte offset of each sequence in the .bin
    m int64  document index: first sequence of each document, and n at the end

A "sequence" is a whole document, unless the text was cut into sentences. As in Megatron's GPT dataset, the
sequence is the unit that is shuffled and split.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.data.errors import CorruptDatasetError, DatasetExistsError, MissingDatasetError, TokenRangeError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

# Codes 6 and 7 are floating types that differ between forks of Megatron; tokens are never stored in them.
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

_CHECK_CHUNK = 1 << 22


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def best_dtype(vocab_size: int | None) -> np.dtype:
    """Megatron's rule: uint16 while every id of the vocabulary fits with room to spare, otherwise int32."""
    return DTYPES[8] if vocab_size is not None and vocab_size < 65500 else DTYPES[4]


class IndexedDataset:
    """Read-only view of a PREFIX.bin/.idx pair. Opened by mmap; pickles as its prefix."""

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        _require_files(self.prefix)
        index = _read_index(self.prefix)
        self.dtype: np.dtype = index.dtype
        self.sizes: np.ndarray = index.sizes  # int32 [n], tokens per sequence
        self.pointers: np.ndarray = index.pointers  # int64 [n], bytes into the .bin
        self.document_index: np.ndarray = index.document_index  # int64 [m]
        # An empty file cannot be mapped.
        empty = bin_path(self.prefix).stat().st_size == 0
        self._tokens = np.empty(0, self.dtype) if empty else np.memmap(bin_path(self.prefix), self.dtype, mode="r")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.get(i)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of sequence `i`, as a view of the mapped file."""
        start = int(self.pointers[i]) // self.dtype.itemsize + offset
        stop = start + (int(self.sizes[i]) - offset if length is None else length)
        return self._tokens[start:stop]

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of the file, in file order, as one mapped array."""
        return self._tokens

    def __reduce__(self):
        return type(self), (self.prefix,)


class IndexedDatasetWriter:
    """Write a pair under temporary names and rename it into place when the `with` block ends well.

    A writer left by an exception removes what it wrote. An existing pair is an error unless `overwrite`.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type = np.uint16, overwrite: bool = False):
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise TokenRangeError(
                "this integer type cannot be stored in an .idx file",
                found=self.dtype,
                expected=", ".join(str(d) for d in CODES),
                where=self.prefix,
            )
        existing = [p for p in (bin_path(prefix), idx_path(prefix)) if p.exists()]
        if existing and not overwrite:
            raise DatasetExistsError(
                "the output dataset is already there",
                found=", ".join(map(str, existing)),
                expected="no such file",
                do="choose another --output-prefix, or remove the files",
            )
        idx_path(prefix).parent.mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
        self._bin_tmp = Path(str(bin_path(prefix)) + suffix)
        self._idx_tmp = Path(str(idx_path(prefix)) + suffix)
        self._file = open(self._bin_tmp, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by __exit__
        self._sizes: list[int] = []
        self._document_index = [0]
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._document_index) - 1

    def add_sequence(self, tokens: Sequence[int] | np.ndarray) -> None:
        """One sequence of the document that the next end_document() closes."""
        array = np.asarray(tokens)
        if array.size:
            self._check_range(array)
        data = np.ascontiguousarray(array, dtype=self.dtype)
        self._file.write(data.tobytes())
        self._sizes.append(data.size)
        self.num_tokens += data.size

    def end_document(self) -> None:
        self._document_index.append(len(self._sizes))

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """One document that is one sequence: the usual case."""
        self.add_sequence(tokens)
        self.end_document()

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._commit()
        else:
            self._discard()

    def _check_range(self, array: np.ndarray) -> None:
        limits = np.iinfo(self.dtype)
        low, high = int(array.min()), int(array.max())
        if array.dtype.kind not in "iu" or low < limits.min or high > limits.max:
            raise TokenRangeError(
                "a token does not fit the file's integer type",
                found=f"tokens of {array.dtype} in [{low}, {high}]",
                expected=f"integers in [{limits.min}, {limits.max}] ({self.dtype})",
                where=f"{self.prefix}, sequence {len(self._sizes)}",
                do="write with a wider dtype (best_dtype(vocab_size) gives the usual one)",
            )
        if array.size > np.iinfo(np.int32).max:
            raise TokenRangeError(
                "a document is too long for the .idx format",
                found=f"{array.size} tokens",
                expected=f"at most {np.iinfo(np.int32).max}",
                where=f"{self.prefix}, sequence {len(self._sizes)}",
                do="cut the document",
            )

    def _commit(self) -> None:
        try:
            _flush(self._file)
            sizes = np.asarray(self._sizes, dtype="<i4")
            pointers = np.zeros(len(sizes), dtype="<i8")
            np.cumsum(sizes[:-1].astype("<i8") * self.dtype.itemsize, out=pointers[1:])
            documents = np.asarray(self._document_index, dtype="<i8")
            with open(self._idx_tmp, "wb") as file:
                file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(sizes), len(documents)))
                for array in (sizes, pointers, documents):
                    file.write(array.tobytes())
                _flush(file, close=False)
            # An old .idx goes first: at no moment does an .idx stand beside a .bin that is not its own.
            idx_path(self.prefix).unlink(missing_ok=True)
            os.replace(self._bin_tmp, bin_path(self.prefix))
            os.replace(self._idx_tmp, idx_path(self.prefix))
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        self._file.close()
        self._bin_tmp.unlink(missing_ok=True)
        self._idx_tmp.unlink(missing_ok=True)


class _Index:
    def __init__(self, dtype: np.dtype, sizes: np.ndarray, pointers: np.ndarray, document_index: np.ndarray):
        self.dtype, self.sizes, self.pointers, self.document_index = dtype, sizes, pointers, document_index


def _flush(file, close: bool = True) -> None:
    file.flush()
    os.fsync(file.fileno())
    if close:
        file.close()


def _require_files(prefix: str) -> None:
    missing = [path for path in (bin_path(prefix), idx_path(prefix)) if not path.is_file()]
    if not missing:
        return
    do = "make it with tools/preprocess_data.py, or correct --data-path"
    if prefix.endswith((".bin", ".idx")) and not _missing_pair(prefix[:-4]):
        do = f"give the prefix without the ending: {prefix[:-4]}"
    elif Path(f"{prefix}_text_document.idx").is_file():
        do = f"give the whole prefix: {prefix}_text_document"
    raise MissingDatasetError(
        "a dataset file is missing",
        found="no " + " and no ".join(str(path) for path in missing),
        expected=f"{bin_path(prefix)} and {idx_path(prefix)}",
        do=do,
    )


def _missing_pair(prefix: str) -> bool:
    return not (bin_path(prefix).is_file() and idx_path(prefix).is_file())


def _read_index(prefix: str) -> _Index:
    path = idx_path(prefix)
    do = "copy the file again from where it was made, or make it again with tools/preprocess_data.py"
    found_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise CorruptDatasetError(
            "this is not an index file of the mmap format",
            found=f"first bytes {header[: len(MAGIC)]!r}",
            expected=f"{MAGIC!r}",
            where=path,
            do="give the prefix of files made with --dataset-impl mmap (not lazy or cached)",
        )
    if len(header) < HEADER.size:
        raise CorruptDatasetError(
            "the .idx file is cut short",
            found=f"{found_bytes} bytes",
            expected=f"at least {HEADER.size}",
            where=path,
            do=do,
        )
    _, version, code, num_sequences, num_entries = HEADER.unpack(header)
    if version != VERSION:
        raise CorruptDatasetError(
            "the .idx file is of another version of the format",
            found=f"version {version}",
            expected=f"version {VERSION}",
            where=path,
            do=do,
        )
    if code not in DTYPES:
        raise CorruptDatasetError(
            "the .idx file names a token type that is no integer type of the format",
            found=f"dtype code {code}",
            expected=", ".join(f"{c} ({d})" for c, d in DTYPES.items()),
            where=path,
            do=do,
        )
    expected_bytes = HEADER.size + 12 * num_sequences + 8 * num_entries
    if found_bytes != expected_bytes:
        raise CorruptDatasetError(
            "the .idx file is cut short" if found_bytes < expected_bytes else "the .idx file is too long",
            found=f"{found_bytes} bytes",
            expected=f"{expected_bytes} bytes for {num_sequences} sequences and {num_entries} document entries",
            where=path,
            do=do,
        )
    raw = np.memmap(path, np.uint8, mode="r")
    at = HEADER.size
    sizes = raw[at : at + 4 * num_sequences].view("<i4")
    at += 4 * num_sequences
    pointers = raw[at : at + 8 * num_sequences].view("<i8")
    document_index = raw[at + 8 * num_sequences :].view("<i8")
    index = _Index(DTYPES[code], sizes, pointers, document_index)
    _check_index(prefix, index, do)
    return index


def _check_index(prefix: str, index: _Index, do: str) -> None:
    """Every sequence lies in the .bin, one after the other, and the .bin ends with the last."""
    itemsize, position = index.dtype.itemsize, 0
    for start in range(0, len(index.sizes), _CHECK_CHUNK):
        sizes = index.sizes[start : start + _CHECK_CHUNK].astype(np.int64)
        ends = position + np.cumsum(sizes * itemsize)
        bad = (sizes < 0) | (index.pointers[start : start + _CHECK_CHUNK] != ends - sizes * itemsize)
        if bad.any():
            i = int(np.argmax(bad))
            raise CorruptDatasetError(
                "the .idx file contradicts itself",
                found=f"sequence {start + i} has {sizes[i]} tokens at byte {index.pointers[start + i]}",
                expected=f"a count >= 0 at byte {ends[i] - sizes[i] * itemsize}, where the previous one ends",
                where=idx_path(prefix),
                do=do,
            )
        position = int(ends[-1])
    documents = index.document_index
    if len(documents) and (documents[0] != 0 or documents[-1] != len(index.sizes) or _falls(documents)):
        raise CorruptDatasetError(
            "the document index of the .idx file is damaged",
            found=f"from {documents[0]} to {documents[-1]}",
            expected=f"from 0 to {len(index.sizes)}, never falling",
            where=idx_path(prefix),
            do=do,
        )
    found = bin_path(prefix).stat().st_size
    if found != position:
        raise CorruptDatasetError(
            "the .bin file is cut short" if found < position else "the .bin file is longer than its .idx says",
            found=f"{found} bytes",
            expected=f"{position} bytes ({position // itemsize} tokens of {index.dtype})",
            where=bin_path(prefix),
            do=do + "; the .bin and .idx must come from the same run",
        )


def _falls(values: np.ndarray) -> bool:
    return any(
        bool(np.any(np.diff(values[start : start + _CHECK_CHUNK + 1]) < 0))
        for start in range(0, len(values), _CHECK_CHUNK)
    )
