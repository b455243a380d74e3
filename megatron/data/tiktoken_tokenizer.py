"""TikTokenizer: byte-pair vocabularies in JSON, special tokens first, encoded by tiktoken.

tokenizer = TikTokenizer("vocab.json", pattern="v2", vocab_size=131072)

The file is a list of {"rank", "token_bytes" (base64), "token_str"}, the first 256 of which are the bytes. Ids count the
special tokens first: unknown, beginning and end of text, then fillers; a token's id is its rank plus their number. Of
the file as many tokens are used as the vocabulary has room for. Format and patterns: Megatron-LM,
megatron/training/tokenizer/tokenizer.py (CustomTikTokenizer).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.data.errors import TokenizerError

_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "v1": _WORD + r"+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*"
    + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
DEFAULT_VOCAB_SIZE, DEFAULT_SPECIAL_TOKENS = 1 << 17, 1000
_SPECIAL = ("<unk>", "<s>", "</s>")
_MAX_BYTES = 1 << 28


class TikTokenizer:
    def __init__(
        self,
        vocab_file: str | Path,
        pattern: str = "v2",
        vocab_size: int | None = None,
        num_special_tokens: int = DEFAULT_SPECIAL_TOKENS,
        special_tokens: Sequence[str] = (),
    ):
        try:
            import tiktoken
        except ImportError as error:
            raise TokenizerError(
                "TikTokenizer needs a package that is not there",
                found="no tiktoken",
                expected="tiktoken",
                where=vocab_file,
                do="pip install tiktoken",
            ) from error
        self._arguments = str(vocab_file), pattern, vocab_size, num_special_tokens, tuple(special_tokens)
        names = list(special_tokens or _SPECIAL)
        self.vocab_size = vocab_size or DEFAULT_VOCAB_SIZE
        faults = [f"{name} is not among them" for name in _SPECIAL if name not in names]
        faults += [f"{name} is there twice" for name in set(names) if names.count(name) > 1]
        if not len(names) <= num_special_tokens < self.vocab_size:
            faults.append(f"{len(names)} names for {num_special_tokens} places in a vocabulary of {self.vocab_size}")
        if faults:
            raise TokenizerError(
                "the special tokens do not fit",
                found="; ".join(faults),
                expected=f"{', '.join(_SPECIAL)} and others, once each",
                where="--tiktoken-special-tokens, --tiktoken-num-special-tokens, --vocab-size",
            )
        ranks = _ranks(Path(vocab_file), self.vocab_size - num_special_tokens)
        self._special = [*names, *(f"<SPECIAL_{i}>" for i in range(len(names), num_special_tokens))]
        self._backend = tiktoken.Encoding(
            Path(vocab_file).stem, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
        )
        self._num_special = num_special_tokens
        self.eod = self._special.index("</s>")

    def tokenize(self, text: str) -> list[int]:
        # What looks like a special token in a text is text.
        return [rank + self._num_special for rank in self._backend.encode_ordinary(text)]

    def detokenize(self, ids: Sequence[int]) -> str:
        """A special token stands for itself."""
        parts: list[bytes] = []
        for i in ids:
            is_special = i < self._num_special
            of_text = self._backend.decode_single_token_bytes
            parts.append(self._special[i].encode() if is_special else of_text(i - self._num_special))
        return b"".join(parts).decode(errors="replace")

    def __reduce__(self):
        return type(self), self._arguments


def _ranks(file: Path, limit: int) -> dict[bytes, int]:
    """Of the first `limit` tokens, by their bytes."""
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"longer than {_MAX_BYTES >> 20} MiB")
        entries = json.loads(file.read_text("utf-8"))
        ranks = {_token(number, entry): number for number, entry in enumerate(entries[:limit])}
        if len(ranks) < min(limit, len(entries)):
            raise ValueError("a token is there twice")
        if len(ranks) < 256:
            raise ValueError(f"{len(ranks)} tokens: the 256 bytes are not all there")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise TokenizerError(
            "this is no vocabulary of a TikTokenizer",
            found=f"{type(error).__name__}: {error}"[:200],
            expected='a list of {"rank", "token_bytes", "token_str"}, the 256 bytes first',
            where=file,
            do="give the model's own file as --tokenizer-model",
        ) from error
    return ranks


def _token(number: int, entry: Any) -> bytes:
    try:
        token = base64.b64decode(entry["token_bytes"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"token {number} is not base64: {error}") from error
    if entry["rank"] != number or (number < 256 and token != bytes([number])):
        raise ValueError(f"token {number} has rank {entry['rank']!r} and bytes {token!r}"[:200])
    return token
