"""Text to token ids and back, with the names of Megatron's --tokenizer-type.

A tokenizer is a small picklable object with `vocab_size` (the true one, before any padding),
`eod` (the id that ends a document), `tokenize` and `detokenize`. Text never produces `eod` by itself: a
document that contains the characters "<|endoftext|>" is text like any other.

    tokenizer = build_tokenizer("GPT2BPETokenizer", "gpt2-vocab.json", "gpt2-merges.txt")
    tokenizer.tokenize("Hello world")      # [15496, 995]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron.data.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"
_MAX_GAPS = 16
"""Times as many ids as tokens; published vocabularies leave a few free, not most of them."""

REFUSED = {
    "BertWordPieceLowerCase": "it is for BERT; this framework trains GPT models",
    "BertWordPieceCase": "it is for BERT; this framework trains GPT models",
    "SentencePieceTokenizer": "use HFTokenizer with the folder that holds the model's tokenizer.json",
    "GPTSentencePieceTokenizer": "use HFTokenizer with the folder that holds the model's tokenizer.json",
    "PretrainedFromHF": "it would download; use HFTokenizer with a local folder as --tokenizer-model",
}


class Tokenizer(Protocol):
    """What the rest of the framework needs of a tokenizer."""

    vocab_size: int
    eod: int

    def tokenize(self, text: str) -> list[int]: ...

    def detokenize(self, ids: Sequence[int]) -> str: ...


def build_tokenizer(
    tokenizer_type: str,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
    tokenizer_model: str | Path | None = None,
    vocab_size: int | None = None,
) -> Tokenizer:
    """The tokenizer named by --tokenizer-type. `vocab_size` is a NullTokenizer's; another one must not be larger.
    Raises TokenizerError."""
    tokenizer = _build(tokenizer_type, vocab_file, merge_file, tokenizer_model, vocab_size)
    if tokenizer_type != "NullTokenizer" and vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise TokenizerError(
            "the vocabulary has no room for the tokenizer's tokens",
            found=f"a vocabulary of {vocab_size} with a tokenizer of {tokenizer.vocab_size}",
            expected=f"at least {tokenizer.vocab_size}",
            where="--vocab-size, or --model-preset, which sets it",
            do=f"give --vocab-size {tokenizer.vocab_size}, or the tokenizer that the model was made for",
        )
    return tokenizer


def _build(
    tokenizer_type: str,
    vocab_file: str | Path | None,
    merge_file: str | Path | None,
    tokenizer_model: str | Path | None,
    vocab_size: int | None,
) -> Tokenizer:
    if tokenizer_type == "GPT2BPETokenizer":
        return GPT2BPETokenizer(
            _existing_file(vocab_file, "--vocab-file", tokenizer_type),
            _existing_file(merge_file, "--merge-file", tokenizer_type),
        )
    if tokenizer_type == "HFTokenizer":
        return HFTokenizer(_existing_folder(tokenizer_model))
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None or vocab_size < 1:
            raise TokenizerError(
                "NullTokenizer needs the size of the vocabulary",
                found=vocab_size,
                expected="a count of at least 1",
                where="--vocab-size",
            )
        return NullTokenizer(vocab_size)
    raise TokenizerError(
        "this tokenizer type is not available",
        found=tokenizer_type,
        expected="GPT2BPETokenizer, HFTokenizer or NullTokenizer",
        where="--tokenizer-type",
        do=REFUSED.get(tokenizer_type),
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
        if self.vocab_size > _MAX_GAPS * len(vocab):
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


class HFTokenizer:
    """A Hugging Face tokenizer from a local folder (tokenizer.json and tokenizer_config.json). Never downloads, and
    runs no code from the folder, nor asks whether it should."""

    def __init__(self, folder: str | Path):
        from transformers import AutoTokenizer  # seconds to import: only who asks for it pays

        self._folder = str(folder)
        try:
            self._backend = AutoTokenizer.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise TokenizerError(
                "the folder holds no tokenizer that transformers can read",
                found=str(error).splitlines()[0] if str(error) else type(error).__name__,
                expected="tokenizer.json and tokenizer_config.json",
                where=folder,
                do="give the model's folder as --tokenizer-model",
            ) from error
        if self._backend.eos_token_id is None:
            raise TokenizerError(
                "the tokenizer has no end-of-sequence token, which ends documents",
                found="eos_token is not set",
                expected="an eos_token",
                where=f"{folder}/tokenizer_config.json",
                do='add "eos_token"',
            )
        self.vocab_size = len(self._backend)
        self.eod: int = self._backend.eos_token_id

    def tokenize(self, text: str) -> list[int]:
        # Special tokens in the text are text; none are added at the ends: --append-eod does that.
        return self._backend(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def __reduce__(self):
        return type(self), (self._folder,)


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
            do="GPT-2's own are training_datasets/gpt2-vocab.json and training_datasets/gpt2-merges.txt",
        )
    return Path(path)


def _existing_folder(path: str | Path | None) -> Path:
    if path is None or not Path(path).is_dir():
        raise TokenizerError(
            "HFTokenizer needs a local folder",
            found="nothing given" if path is None else f"no folder {path}",
            expected="a folder with tokenizer.json and tokenizer_config.json",
            where="--tokenizer-model",
            do="save the tokenizer there with save_pretrained; nothing is downloaded at run time",
        )
    return Path(path)
