"""Training samples out of token files: what --data-path, --split, --seq-length and --seed mean together.

Item i of a dataset is the same tokens on every rank and under every topology; who reads which
item is decided elsewhere (sampler.py).

    train, valid, test = build_datasets(["gpt2_text_document"], "949,50,1", 128, seed=1234, num_samples=(800, 80, 8))
    train[0]["tokens"]      # int64 [129]: 128 inputs and, moved by one, 128 labels
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron.data.blending import BlendedDataset, blending_index, parse_data_path, samples_needed
from megatron.data.errors import IndexCacheError, NotEnoughTokensError, SplitError, VocabularyMismatchError
from megatron.data.index_cache import cached_sample_index
from megatron.data.indexed_dataset import IndexedDataset, idx_path
from megatron.data.sample_index import SampleIndex, build_sample_index
from megatron.data.split import PARTS, parse_split, split_documents

logger = logging.getLogger(__name__)

_CHECKED_WHOLE = 1 << 26  # tokens; larger files are checked in _CHECKED_BLOCKS places
_CHECKED_BLOCKS = 64
_BLOCK = 1 << 18


class GPTDataset:
    """Samples of seq_length + 1 tokens over documents [start, stop) of one token file. Pickles by name."""

    def __init__(self, indexed: IndexedDataset, index: SampleIndex, seq_length: int, vocab_size: int | None = None):
        self.indexed, self.index = indexed, index
        self.seq_length, self.vocab_size = seq_length, vocab_size

    def __len__(self) -> int:
        """All samples of the whole epochs that were planned: at least as many as were asked for."""
        return len(self.index.shuffle_index)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        tokens = self._tokens(int(self.index.shuffle_index[i]))
        if self.vocab_size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise _mismatch(self.indexed.prefix, tokens, self.vocab_size, f"sample {i}")
        return {"tokens": tokens}

    def _tokens(self, k: int) -> np.ndarray:
        """Sample k before shuffling: from its own beginning to the next one's first token, inclusive."""
        position, offset = map(int, self.index.sample_index[k])
        last_position, last_offset = map(int, self.index.sample_index[k + 1])
        tokens = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        while filled < len(tokens):
            stop = last_offset + 1 if position == last_position else None
            document = int(self.index.document_index[position])
            piece = self.indexed.get(document, offset, None if stop is None else stop - offset)
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            position, offset = position + 1, 0
        return tokens


def build_datasets(
    paths: Sequence[str],
    split: str,
    seq_length: int,
    seed: int,
    num_samples: tuple[int, int, int],
    cache_dir: str | Path | None = None,
    vocab_size: int | None = None,
) -> tuple[GPTDataset | BlendedDataset | None, ...]:
    """(train, valid, test). None for a part of which no samples are wanted or whose share in `split` is 0.

    `paths`: one prefix or Megatron's "weight prefix weight prefix ...". `num_samples`: at least so many per part.
    `cache_dir`: where indices are kept; None = PREFIX.index_cache beside the data, or memory if that cannot be
    written. `vocab_size`: token ids from there on are an error, in the first look at the file and in every sample.
    Local: every process may call it at the same time, none waits for a collective.
    Raises MissingDatasetError, CorruptDatasetError, BlendError, SplitError, NotEnoughTokensError,
    VocabularyMismatchError, IndexCacheError (only for a cache_dir that was asked for).
    """
    entries = parse_data_path(paths)
    shares = parse_split(split)
    files = [IndexedDataset(entry.prefix) for entry in entries]
    if vocab_size is not None:
        for file in files:
            check_vocabulary(file, vocab_size)
    weights = [entry.weight for entry in entries]
    datasets: list[GPTDataset | BlendedDataset | None] = []
    for part, (name, wanted) in enumerate(zip(PARTS, num_samples, strict=True)):
        if wanted <= 0 or shares[part] == 0:
            if wanted > 0:
                logger.info("no %s samples: its share in --split %s is 0", name, split)
            datasets.append(None)
            continue
        needed = [wanted]
        if len(files) > 1:
            needed = samples_needed(weights, blending_index(weights, wanted)[0], wanted)
        built = [
            _build_part(file, part, split, count, seq_length, seed, cache_dir, vocab_size)
            for file, count in zip(files, needed, strict=True)
        ]
        datasets.append(built[0] if len(built) == 1 else BlendedDataset(built, weights, wanted))
    return tuple(datasets)


def check_vocabulary(indexed: IndexedDataset, vocab_size: int) -> None:
    """Raise VocabularyMismatchError if the file holds ids outside [0, vocab_size).

    Files over 64 M tokens are looked at in 64 places; the rest is checked as samples are read.
    """
    for start, block in _looked_at(indexed):
        if int(block.max()) >= vocab_size or int(block.min()) < 0:
            raise _mismatch(indexed.prefix, block, vocab_size, f"tokens {start} to {start + len(block) - 1}")


def without_token(paths: Sequence[str], token: int) -> list[str]:
    """The prefixes in whose files `token` was not found, looking where `check_vocabulary` looks."""
    files = (IndexedDataset(entry.prefix) for entry in parse_data_path(paths))
    return [file.prefix for file in files if not any((block == token).any() for _, block in _looked_at(file))]


def _looked_at(indexed: IndexedDataset) -> Iterator[tuple[int, np.ndarray]]:
    """(first position, tokens): all of a small file, 64 places of a large one."""
    tokens = indexed.tokens
    starts = range(0, len(tokens), _BLOCK)
    if len(tokens) > _CHECKED_WHOLE:
        starts = np.linspace(0, len(tokens) - _BLOCK, _CHECKED_BLOCKS, dtype=np.int64)
    for start in starts:
        yield int(start), tokens[start : start + _BLOCK]


def order_crc32(dataset: GPTDataset | BlendedDataset) -> str:
    """Eight hexadecimal digits that are the same if and only if (but for 1 in 4 billion) the dataset gives the same
    samples in the same order: its indices, not its tokens."""
    crc = 0
    for part in dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]:
        index = part.index
        for array in (index.document_index, index.sample_index, index.shuffle_index):
            crc = zlib.crc32(np.ascontiguousarray(array), crc)
    if isinstance(dataset, BlendedDataset):
        crc = zlib.crc32(np.ascontiguousarray(dataset.sample_index), zlib.crc32(dataset.dataset_index, crc))
    return f"{crc:08x}"


def _build_part(
    file: IndexedDataset,
    part: int,
    split: str,
    num_samples: int,
    seq_length: int,
    seed: int,
    cache_dir: str | Path | None,
    vocab_size: int | None,
) -> GPTDataset:
    start, stop = documents = split_documents(split, len(file))[part]
    if stop <= start:
        raise SplitError(
            f"--split leaves no document for {PARTS[part]}",
            found=f"{len(file)} documents, split {split}",
            expected="at least one document in every part that is used",
            where=idx_path(file.prefix),
            do="give the part a larger share, use more documents, or ask for no samples of it (--eval-iters 0)",
        )
    if not int(file.sizes[start:stop].sum(dtype=np.int64)):
        raise NotEnoughTokensError(
            f"the {PARTS[part]} documents hold no token",
            found=f"documents {start} to {stop - 1}, all empty",
            expected="at least one token",
            where=idx_path(file.prefix),
            do="check the data",
        )
    arguments = (file.sizes, documents, num_samples, seq_length, seed)
    folder = Path(f"{file.prefix}.index_cache") if cache_dir is None else Path(cache_dir)
    try:
        index = cached_sample_index(folder, PARTS[part], *arguments)
    except IndexCacheError as error:
        if cache_dir is not None:
            raise
        logger.warning("indices are kept in memory: %s", error)
        index = build_sample_index(*arguments)
    return GPTDataset(file, index, seq_length, vocab_size)


def _mismatch(prefix: str, tokens: np.ndarray, vocab_size: int, place: str) -> VocabularyMismatchError:
    return VocabularyMismatchError(
        "the data was tokenised with another vocabulary",
        found=f"token ids from {int(tokens.min())} to {int(tokens.max())}",
        expected=f"ids from 0 to {vocab_size - 1}",
        where=f"{prefix}.bin, {place}",
        do="train with the tokenizer that the data was made with, or tokenise again with tools/preprocess_data.py",
    )
