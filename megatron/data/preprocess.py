"""Text files to one token file: read, tokenise on several processes, write in the order of the input.

The output does not depend on the number of workers. Batches of lines go out to the workers and
come back in order, a bounded number at a time, so memory does not grow with the input.

    job = PreprocessJob(inputs=("corpus.jsonl",), output_prefix="corpus", tokenizer=TokenizerSpec(...))
    preprocess(job)      # writes corpus_text_document.bin and .idx

Inputs by ending: .jsonl and .json hold one JSON object a line, the document under each of `json_keys`;
.txt holds documents separated by blank lines (`txt_documents`: or one a line, or one a file).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from megatron.data.errors import DataError, DatasetExistsError, InputTextError
from megatron.data.indexed_dataset import IndexedDatasetWriter, best_dtype, bin_path, idx_path
from megatron.data.tokenizer import Tokenizer, TokenizerSpec

TXT_DOCUMENTS = ("block", "line", "file")
_JSON_ENDINGS = (".jsonl", ".json")
_BATCH_BYTES = 1 << 18
_BATCHES_PER_WORKER = 4
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class PreprocessJob:
    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerSpec
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    """Put the tokenizer's end-of-document id after every document."""
    workers: int = 1
    """Tokenising processes; with 1 everything happens in this process."""
    txt_documents: str = "block"
    """What a document is in a .txt file: one of TXT_DOCUMENTS."""
    replace_broken_text: bool = False
    """What is no text (bytes that are no UTF-8, half a surrogate pair) becomes U+FFFD instead of an error."""

    def output(self, key: str) -> str:
        return f"{self.output_prefix}_{key}_document"


@dataclass(frozen=True)
class Progress:
    """How far a running job is. `documents` counts those written, `empty` those left out for having no text, `replaced`
    those in which something that is no text was replaced."""

    bytes_done: int
    bytes_total: int
    documents: int
    empty: int
    tokens: int
    replaced: int = 0


def preprocess(job: PreprocessJob, report: Callable[[Progress], None] | None = None) -> Progress:
    """Run the job; `report` is called after every batch. Everything is checked before anything is written.

    Raises InputTextError, TokenizerError, DatasetExistsError. On any error no output is left.
    """
    _check(job)
    tokenizer = job.tokenizer.build()
    dtype = best_dtype(tokenizer.vocab_size)
    bytes_total = sum(Path(path).stat().st_size for path in job.inputs)
    done = Progress(0, bytes_total, 0, 0, 0)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(job.output(key), dtype)) for key in job.json_keys]
        encoder = _Encoder(job, tokenizer)
        for encoded in stack.enter_context(_encoded_batches(job, encoder)):
            for writer, (tokens, lengths) in zip(writers, encoded.columns, strict=True):
                for document in np.split(tokens, np.cumsum(lengths[:-1])) if lengths else ():
                    writer.add_document(document)
            done = Progress(
                done.bytes_done + encoded.num_bytes,
                bytes_total,
                writers[0].num_documents,
                done.empty + encoded.num_empty,
                sum(writer.num_tokens for writer in writers),
                done.replaced + encoded.num_replaced,
            )
            if report:
                report(done)
        if not done.documents:
            raise InputTextError(
                "the input holds no document",
                found=f"{done.empty} empty documents",
                expected="at least one with text",
                where=", ".join(job.inputs),
            )
    return done


@dataclass(frozen=True)
class _Batch:
    path: str
    lines: tuple[tuple[int, bytes], ...]  # (line number in the file, raw text of one document)
    num_bytes: int


@dataclass(frozen=True)
class _Encoded:
    columns: tuple[tuple[np.ndarray, list[int]], ...]  # per key: tokens of all documents, tokens per document
    num_bytes: int
    num_empty: int
    num_replaced: int


def _check(job: PreprocessJob) -> None:
    if job.txt_documents not in TXT_DOCUMENTS:
        raise InputTextError(
            "unknown kind of text document",
            found=job.txt_documents,
            expected=", ".join(TXT_DOCUMENTS),
            where="--txt-documents",
        )
    missing = [path for path in job.inputs if not Path(path).is_file()]
    if missing or not job.inputs:
        raise InputTextError(
            "input files are missing",
            found="no " + ", ".join(missing) if missing else "no file given",
            expected="existing files",
            where="--input",
        )
    other = [path for path in job.inputs if Path(path).suffix not in (*_JSON_ENDINGS, ".txt")]
    if other:
        raise InputTextError(
            "the ending of an input file does not say what it holds",
            found=", ".join(other),
            expected=".jsonl or .json (one JSON object a line) or .txt",
            where="--input",
            do="unpack or rename the file",
        )
    texts = [path for path in job.inputs if path.endswith(".txt")]
    if texts and job.json_keys != ("text",):
        raise InputTextError(
            "a .txt file has no keys",
            found=f"--json-keys {' '.join(job.json_keys)}",
            expected="text",
            where=", ".join(texts),
            do="leave --json-keys out, or give .jsonl files",
        )
    outputs = [f(job.output(key)) for key in job.json_keys for f in (bin_path, idx_path)]
    existing = [str(path) for path in outputs if path.exists()]
    if existing:
        raise DatasetExistsError(
            "the output dataset is already there",
            found=", ".join(existing),
            expected="no such file",
            do="choose another --output-prefix, or remove the files",
        )


class _Encoder:
    """Batch of raw documents -> tokens. Lives once in every worker."""

    def __init__(self, job: PreprocessJob, tokenizer: Tokenizer):
        self._job, self._tokenizer = job, tokenizer
        self._dtype = best_dtype(tokenizer.vocab_size)

    def __call__(self, batch: _Batch) -> _Encoded:
        columns: tuple[tuple[list, list], ...] = tuple(([], []) for _ in self._job.json_keys)
        num_empty = num_replaced = 0
        for line_number, raw in batch.lines:
            texts, is_replaced = self._texts(batch.path, line_number, raw)
            num_replaced += is_replaced
            if not any(texts):
                num_empty += 1
                continue
            self._require_all(texts, batch.path, line_number)
            for (tokens, lengths), text in zip(columns, texts, strict=True):
                ids = self._ids(batch.path, line_number, text)
                tokens.append(np.asarray(ids, dtype=self._dtype))
                lengths.append(len(ids))
        empty = np.empty(0, self._dtype)
        arrays = tuple((np.concatenate(tokens or [empty]), lengths) for tokens, lengths in columns)
        return _Encoded(arrays, batch.num_bytes, num_empty, num_replaced)

    def _require_all(self, texts: list[str], path: str, line_number: int) -> None:
        """Document i of every key's dataset is of one line, so a line cannot give a document to some keys only."""
        if not all(texts):
            raise InputTextError(
                "a line has text under one key and none under another",
                found=", ".join(key for key, text in zip(self._job.json_keys, texts) if not text) + " empty",
                expected="text under each of --json-keys, or under none",
                where=f"{path}, line {line_number}",
                do="leave the line out of the file, fill it, or tokenise one key at a time",
            )

    def _ids(self, path: str, line_number: int, text: str) -> list[int]:
        try:
            ids = self._tokenizer.tokenize(text)
        except Exception as error:  # whatever a tokenizer stumbles over is of this line
            raise InputTextError(
                "the tokenizer cannot take a document",
                found=f"{type(error).__name__}: {error}"[:200],
                where=f"{path}, line {line_number}",
                do="look at the line, and at --tokenizer-type",
            ) from error
        if self._job.append_eod:
            ids.append(self._tokenizer.eod)
        if ids and not 0 <= min(ids) <= max(ids) < self._tokenizer.vocab_size:
            raise InputTextError(
                "the tokenizer gave an id outside its vocabulary",
                found=f"ids in [{min(ids)}, {max(ids)}]",
                expected=f"[0, {self._tokenizer.vocab_size})",
                where=f"{path}, line {line_number}",
                do="check --vocab-size and the tokenizer's files",
            )
        return ids

    def _texts(self, path: str, line_number: int, raw: bytes) -> tuple[list[str], bool]:
        """(text under each key, whether something that is no text was replaced)"""
        try:
            text, is_replaced = raw.decode("utf-8"), False
        except UnicodeDecodeError as error:
            if not self._job.replace_broken_text:
                raise InputTextError(
                    "the input is not UTF-8 text",
                    found=f"byte 0x{raw[error.start]:02x}",
                    expected="UTF-8",
                    where=f"{path}, line {line_number}",
                    do="convert the file, for example with iconv, or give --replace-broken-text",
                ) from error
            text, is_replaced = raw.decode("utf-8", errors="replace"), True
        if path.endswith(".txt"):
            return [text.replace("\r\n", "\n").strip("\n")], is_replaced
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise InputTextError(
                "a line is not JSON",
                found=f"{text[:60]!r} ({at})",
                expected='one JSON object, for example {"text": "..."}',
                where=f"{path}, line {line_number}",
                do="one object on each line; if the file is plain text, let its name end in .txt",
            ) from error
        texts = [self._value(record, key, path, line_number) for key in self._job.json_keys]
        whole = [self._whole(text, path, line_number) for text in texts]
        return whole, is_replaced or whole != texts

    def _whole(self, text: str, path: str, line_number: int) -> str:
        """JSON can write half a surrogate pair, which is no character."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if not self._job.replace_broken_text:
                raise InputTextError(
                    "a text has half a surrogate pair, which is no character",
                    found=f"{text[error.start]!r} at character {error.start}",
                    where=f"{path}, line {line_number}",
                    do="mend the line, or give --replace-broken-text",
                ) from error
            # A pair of halves that were written one by one is a character after all.
            return text.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")
        return text

    @staticmethod
    def _value(record: object, key: str, path: str, line_number: int) -> str:
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise InputTextError(
                "a line has no text under the wanted key",
                found=f"keys {found}" if isinstance(record, dict) else found,
                expected=f"an object with a string under {key!r}",
                where=f"{path}, line {line_number}",
                do="name the right key with --json-keys",
            )
        return record[key]


class _encoded_batches:
    """Context manager around an iterator of _Encoded, in input order."""

    def __init__(self, job: PreprocessJob, encoder: _Encoder):
        self._job, self._encoder = job, encoder
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Iterator[_Encoded]:
        if self._job.workers <= 1:
            return map(self._encoder, _batches(self._job))
        # spawn: a fork of a process in which the tokenizer's threads have run may hang.
        self._pool = ProcessPoolExecutor(
            self._job.workers, get_context("spawn"), initializer=_start_worker, initargs=(self._job,)
        )
        return self._through_pool(self._pool)

    def __exit__(self, *_) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _through_pool(self, pool: ProcessPoolExecutor) -> Iterator[_Encoded]:
        waiting: deque[Future[_Encoded]] = deque()
        try:
            for batch in _batches(self._job):
                waiting.append(pool.submit(_encode_in_worker, batch))
                if len(waiting) >= self._job.workers * _BATCHES_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenising process died",
                found=str(error),
                expected=f"{self._job.workers} living processes",
                where="--workers",
                do="most often memory ran out: use fewer workers",
            ) from error


_worker_encoder: _Encoder | None = None  # one per worker process, set once by its initialiser


def _start_worker(job: PreprocessJob) -> None:
    global _worker_encoder
    _worker_encoder = _Encoder(job, job.tokenizer.build())


def _encode_in_worker(batch: _Batch) -> _Encoded:
    return _worker_encoder(batch)


def _batches(job: PreprocessJob) -> Iterator[_Batch]:
    for path in job.inputs:
        lines: list[tuple[int, bytes]] = []
        num_bytes = 0
        for line_number, raw, consumed in _documents(path, job.txt_documents):
            num_bytes += consumed
            if raw:
                lines.append((line_number, raw))
            if num_bytes >= _BATCH_BYTES:
                yield _Batch(path, tuple(lines), num_bytes)
                lines, num_bytes = [], 0
        yield _Batch(path, tuple(lines), num_bytes)


def _documents(path: str, txt_documents: str) -> Iterator[tuple[int, bytes, int]]:
    """(line number, raw document, bytes of the file read for it); b"" for lines between documents."""
    whole_file = path.endswith(".txt") and txt_documents == "file"
    in_blocks = path.endswith(".txt") and txt_documents == "block"
    held: list[bytes] = []
    held_from = 1
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, 1):
            consumed = len(line)
            if line_number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            is_blank = not line.strip()
            if whole_file or (in_blocks and not is_blank):
                if not held:
                    held_from = line_number
                held.append(line)
                yield line_number, b"", consumed
            elif in_blocks:
                yield held_from, b"".join(held), consumed
                held = []
            else:
                yield line_number, b"" if is_blank else line, consumed
    if b"".join(held).strip():
        yield held_from, b"".join(held), 0
