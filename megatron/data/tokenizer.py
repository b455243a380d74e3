"""Text to token ids and back, with the names of Megatron's --tokenizer-type.

A tokenizer is a small picklable object with `vocab_size` (the true one, before any padding),
`eod` (the id that ends a document), `tokenize` and `detokenize`. Text never produces `eod` by itself: a
document that contains the characters "<|endoftext|>" is text like any other.

    tokenizer = TokenizerSpec("GPT2BPETokenizer", "gpt2-vocab.json", "gpt2-merges.txt").build()
    tokenizer.tokenize("Hello world")      # [15496, 995]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron.data.errors import TokenizerError
from megatron.data.huggingface_tokenizer import MAX_GAPS, HFTokenizer
from megatron.data.tiktoken_tokenizer import DEFAULT_SPECIAL_TOKENS

END_OF_TEXT = "<|endoftext|>"

REFUSED = {
    "BertWordPieceLowerCase": "it is for BERT; this framework trains GPT models",
    "BertWordPieceCase": "it is for BERT; this framework trains GPT models",
    "SentencePieceTokenizer": "it adds tokens of BERT and T5; use GPTSentencePieceTokenizer or Llama2Tokenizer",
}
HUGGING_FACE = ("HFTokenizer", "PretrainedFromHF", "HuggingFaceTokenizer")
"""Names of one kind: upstream's, Megatron-DeepSpeed's older one, and Megatron-LM's."""
SENTENCE_PIECE = ("GPTSentencePieceTokenizer", "Llama2Tokenizer")
KINDS = ("GPT2BPETokenizer", *HUGGING_FACE, *SENTENCE_PIECE, "TikTokenizer", "NullTokenizer")


class Tokenizer(Protocol):
    """What the rest of the framework needs of a tokenizer."""

    vocab_size: int
    eod: int

    def tokenize(self, text: str) -> list[int]: ...

    def detokenize(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer, in a form that travels to worker processes. Fields are the flags'."""

    tokenizer_type: str = "GPT2BPETokenizer"
    vocab_file: str | Path | None = None
    merge_file: str | Path | None = None
    tokenizer_model: str | Path | None = None
    vocab_size: int | None = None
    """Of a NullTokenizer or TikTokenizer; another one must not be larger."""
    tiktoken_pattern: str = "v2"
    tiktoken_num_special_tokens: int = DEFAULT_SPECIAL_TOKENS
    tiktoken_special_tokens: tuple[str, ...] = ()

    def build(self) -> Tokenizer:
        """Raises TokenizerError."""
        tokenizer, kind = self._build(), self.tokenizer_type
        if kind != "NullTokenizer" and self.vocab_size is not None and self.vocab_size < tokenizer.vocab_size:
            raise TokenizerError(
                "the vocabulary has no room for the tokenizer's tokens",
                found=f"a vocabulary of {self.vocab_size} with a tokenizer of {tokenizer.vocab_size}",
                expected=f"at least {tokenizer.vocab_size}",
                where="--vocab-size, or what sets it: --model-preset, --use-checkpoint-args",
                do=f"give --vocab-size {tokenizer.vocab_size}, or the tokenizer that the model was made for",
            )
        return tokenizer

    def _build(self) -> Tokenizer:
        kind = self.tokenizer_type
        if kind == "GPT2BPETokenizer":
            return GPT2BPETokenizer(
                _existing_file(self.vocab_file, "--vocab-file", kind),
                _existing_file(self.merge_file, "--merge-file", kind),
            )
        if kind in HUGGING_FACE:
            if self.tokenizer_model is None:
                _existing_file(None, "--tokenizer-model", kind)
            return HFTokenizer(self.tokenizer_model)
        if kind in SENTENCE_PIECE:
            from megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer

            file = _existing_file(self.tokenizer_model, "--tokenizer-model", kind)
            return SentencePieceTokenizer(file, has_bos=kind == "Llama2Tokenizer")
        if kind == "TikTokenizer":
            from megatron.data.tiktoken_tokenizer import TikTokenizer

            return TikTokenizer(
                _existing_file(self.tokenizer_model, "--tokenizer-model", kind),
                self.tiktoken_pattern,
                self.vocab_size,
                self.tiktoken_num_special_tokens,
                self.tiktoken_special_tokens,
            )
        if kind == "NullTokenizer":
            if self.vocab_size is None or self.vocab_size < 1:
                raise TokenizerError(
                    "NullTokenizer needs the size of the vocabulary",
                    found=self.vocab_size,
                    expected="a count of at least 1",
                    where="--vocab-size",
                )
            return NullTokenizer(self.vocab_size)
        raise TokenizerError(
            "this tokenizer type is not available",
            found=kind,
            expected=", ".join(KINDS),
            where="--tokenizer-type",
            do=REFUSED.get(kind),
        )


class GPT2BPETokenizer:
    """GPT-2's byte-level BPE from its vocabulary (JSON) and merges (text)."""

    def __init__(self, vocab_file: str | Path, merge_file: str | Path):
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        self._files = (str(vocab_file), str(merge_file))
        try:
            vocab, merges = models.BPE.read_file(*self._files)
            model = models.BPE(vocab, merges)  # refuses merges into what is no token
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(
                "the vocabulary or the merges cannot be read",
                found=str(error),
                expected="a JSON object of token -> id, and one merge 'left right' a line",
                where=f"{vocab_file}, {merge_file}",
                do="give GPT-2's vocabulary as --vocab-file and its merges as --merge-file",
            ) from error
        if END_OF_TEXT not in vocab:
            raise TokenizerError(
                "the vocabulary has no end-of-document token",
                found=f"{len(vocab)} entries without {END_OF_TEXT}",
                expected=END_OF_TEXT,
                where=vocab_file,
            )
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > MAX_GAPS * len(vocab):
            raise TokenizerError(
                "the vocabulary's ids leave gaps, and every id up to the last takes a row of the embedding",
                found=f"{len(vocab)} tokens, the last id {self.vocab_size - 1}",
                expected=f"ids from 0 to about {len(vocab) - 1}",
                where=vocab_file,
                do="number the tokens anew, or give the vocabulary that the data was made with",
            )
        # The end-of-text entry stays an ordinary entry: no merge leads to it, so text cannot produce it.
        self._backend = Backend(model)
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._backend.decoder = decoders.ByteLevel()
        self.eod: int = vocab[END_OF_TEXT]

    def tokenize(self, text: str) -> list[int]:
        return self._backend.encode(text).ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def __reduce__(self):
        return type(self), self._files


class NullTokenizer:
    """Text that is already ids: "12 7 5". As in Megatron, `eod` is one id past those given."""

    def __init__(self, num_ids: int):
        self._num_ids = num_ids
        self.vocab_size = num_ids + 1
        self.eod = num_ids

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(str(i) for i in ids)

    def __reduce__(self):
        return type(self), (self._num_ids,)


def _existing_file(path: str | Path | None, flag: str, tokenizer_type: str) -> Path:
    if path is None or not Path(path).is_file():
        raise TokenizerError(
            f"{tokenizer_type} needs a file that is not there",
            found="nothing given" if path is None else f"no file {path}",
            expected="an existing file",
            where=flag,
            do="give the tokenizer's own file or folder"
            if flag == "--tokenizer-model"
            else "GPT-2's own are training_datasets/gpt2-vocab.json and training_datasets/gpt2-merges.txt",
        )
    return Path(path)
