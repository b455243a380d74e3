"""Tokenise text into the .bin/.idx pair that --data-path reads, with Megatron's flags.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus \
        --tokenizer-type GPT2BPETokenizer --vocab-file training_datasets/gpt2-vocab.json \
        --merge-file training_datasets/gpt2-merges.txt --append-eod --workers 4

writes corpus_text_document.bin and corpus_text_document.idx; train with --data-path corpus_text_document.

--input takes several files. One ending in .jsonl or .json holds a JSON object on each line, with the document
under "text" (or under each of --json-keys, one output per key). One ending in .txt holds documents separated
by blank lines; --txt-documents line makes every line a document, --txt-documents file the whole file.

The outputs appear under their names only when they are complete. Exit code: 0 done, 1 error, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time

from tqdm import tqdm

from megatron.data.errors import DataError
from megatron.data.preprocess import TXT_DOCUMENTS, PreprocessJob, Progress, preprocess
from megatron.data.tiktoken_tokenizer import DEFAULT_SPECIAL_TOKENS, PATTERNS
from megatron.data.tokenizer import KINDS, REFUSED, TokenizerSpec

_NOTES = {
    "lang": "--lang only matters when splitting sentences",
    "partitions": "--partitions: one pass over all inputs gives the same output",
    "make_vocab_size_divisible_by": "--make-vocab-size-divisible-by acts at training time, not here",
}


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    _refuse(parser, args, unknown)
    job = PreprocessJob(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        tokenizer=TokenizerSpec(
            args.tokenizer_type,
            args.vocab_file,
            args.merge_file,
            args.tokenizer_model,
            args.vocab_size,
            args.tiktoken_pattern,
            args.tiktoken_num_special_tokens,
            tuple(args.tiktoken_special_tokens),
        ),
        json_keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        workers=args.workers,
        txt_documents=args.txt_documents,
        replace_broken_text=args.replace_broken_text,
    )
    for name, note in _NOTES.items():
        if getattr(args, name) is not None:
            print(f"note: {note}; it has no effect", file=sys.stderr)
    if not args.append_eod:
        print("note: without --append-eod nothing separates the documents in training", file=sys.stderr)
    view = _Bar() if sys.stderr.isatty() else _Lines(args.log_interval)
    start = time.perf_counter()
    try:
        done = preprocess(job, view.show)
    except DataError as error:
        view.close()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    view.close()
    seconds = max(time.perf_counter() - start, 1e-9)
    print(
        f"{done.documents} documents, {done.tokens} tokens in {seconds:.1f} s "
        f"({done.tokens / seconds / 1e6:.2f} M tokens/s, {done.bytes_total / seconds / 1e6:.2f} MB/s)"
        + (f"; {done.empty} empty documents left out" if done.empty else "")
        + (f"; broken text replaced in {done.replaced}" if done.replaced else "")
    )
    for key in job.json_keys:
        print(f"wrote {job.output(key)}.bin and .idx")
    return 0


class _Bar:
    """Progress on a terminal: bytes, speed, time left, documents per second."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def show(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(total=progress.bytes_total, unit="B", unit_scale=True, desc="tokenising")
        self._bar.update(progress.bytes_done - self._bar.n)
        elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(f"{progress.documents} docs, {progress.documents / elapsed:.0f} docs/s")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Lines:
    """Progress in a log file: one line every `interval` documents."""

    def __init__(self, interval: int) -> None:
        self._interval, self._next, self._start = interval, interval, time.perf_counter()

    def show(self, progress: Progress) -> None:
        if progress.documents < self._next:
            return
        self._next = (progress.documents // self._interval + 1) * self._interval
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        speed = max(progress.bytes_done / elapsed, 1e-9)
        print(
            f"{progress.documents} documents, {progress.bytes_done / 1e6:.1f} of "
            f"{progress.bytes_total / 1e6:.1f} MB, {progress.documents / elapsed:.0f} docs/s, "
            f"{speed / 1e6:.2f} MB/s, {(progress.bytes_total - progress.bytes_done) / speed:.0f} s left",
            file=sys.stderr,
        )

    def close(self) -> None:
        pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="text files, .jsonl/.json or .txt")
    add("--output-prefix", required=True, help="outputs are PREFIX_KEY_document.bin and .idx")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold documents (text)")
    add("--txt-documents", choices=TXT_DOCUMENTS, default="block", help="what a document is in a .txt (block)")
    add("--tokenizer-type", default="GPT2BPETokenizer", help=f"one of {', '.join(KINDS)} (GPT2BPETokenizer)")
    add("--vocab-file", help="GPT-2 vocabulary (JSON)")
    add("--merge-file", help="GPT-2 merges")
    add("--tokenizer-model", "--tokenizer-name-or-path", help="folder, tokenizer.json, tokenizer.model or vocabulary")
    add("--vocab-size", type=int, help="NullTokenizer: number of ids; TikTokenizer: tokens with the special ones")
    add("--tiktoken-pattern", choices=tuple(PATTERNS), default="v2", help="how a TikTokenizer cuts text into words")
    add("--tiktoken-num-special-tokens", type=int, default=DEFAULT_SPECIAL_TOKENS, help="ids before the others (1000)")
    add(
        "--tiktoken-special-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="their names, as far as they have some",
    )
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--replace-broken-text", action="store_true", help="U+FFFD for what is no text, instead of an error; counted")
    add("--dataset-impl", default="mmap", help="only mmap")
    add("--workers", type=int, default=1, help="tokenising processes (1)")
    add("--log-interval", type=int, default=1000, help="documents between lines of progress (1000)")
    add("--split-sentences", action="store_true", help="refused: see the message")
    add("--keep-newlines", action="store_true", help="refused: see the message")
    add("--lang", help="accepted, no effect")
    add("--partitions", type=int, help="accepted, no effect")
    add("--make-vocab-size-divisible-by", type=int, help="accepted, no effect")
    return parser


def _refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, unknown: list[str]) -> None:
    """Wrong usage ends the program with code 2, by argparse's own rule."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for flag in unknown:
        near = difflib.get_close_matches(flag.split("=")[0], flags, 1)
        parser.error(f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else ""))
    if args.split_sentences or args.keep_newlines:
        parser.error(
            "--split-sentences and --keep-newlines are for BERT-style data: GPT training packs whole documents "
            "and keeps their newlines. Leave them out"
        )
    if args.dataset_impl != "mmap":
        parser.error(f"--dataset-impl {args.dataset_impl}: only mmap is written; lazy and cached are obsolete")
    if args.tokenizer_type in REFUSED:
        parser.error(f"--tokenizer-type {args.tokenizer_type}: {REFUSED[args.tokenizer_type]}")
    for name in ("workers", "log_interval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")


if __name__ == "__main__":
    sys.exit(main())
