"""SentencePiece models, as Megatron-LM uses them for GPT: GPTSentencePieceTokenizer and Llama2Tokenizer.

tokenizer = SentencePieceTokenizer("tokenizer.model", has_bos=True)

Both end a document with the model's end of sentence. The second begins each text with the beginning of sentence
(Megatron-LM, megatron/training/tokenizer/tokenizer.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.data.errors import TokenizerError


class SentencePieceTokenizer:
    def __init__(self, model_file: str | Path, has_bos: bool = False):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise TokenizerError(
                "SentencePiece models need a package that is not there",
                found="no sentencepiece",
                expected="sentencepiece",
                where=model_file,
                do="pip install sentencepiece",
            ) from error
        self._arguments = str(model_file), has_bos
        try:
            self._backend = SentencePieceProcessor(model_proto=Path(model_file).read_bytes())
            if not self._backend.get_piece_size():
                raise ValueError("no pieces in it")
        except (RuntimeError, OSError, TypeError, ValueError) as error:
            raise TokenizerError(
                "this is no SentencePiece model",
                found=str(error).splitlines()[0] if str(error) else type(error).__name__,
                expected="a tokenizer.model",
                where=model_file,
                do="give the model's own file as --tokenizer-model",
            ) from error
        self.vocab_size: int = self._backend.get_piece_size()
        self.eod: int = self._backend.eos_id()
        self._bos = [self._backend.bos_id()] if has_bos else []
        if missing := [name for name, number in (("eos", self.eod), ("bos", min(self._bos, default=0))) if number < 0]:
            raise TokenizerError(
                "the model lacks a token that is needed",
                found=f"no {' and no '.join(missing)}",
                expected="eos, which ends documents; of a Llama2Tokenizer bos too",
                where=model_file,
                do="use GPTSentencePieceTokenizer, or a model that was trained with them",
            )

    def tokenize(self, text: str) -> list[int]:
        return [*self._bos, *self._backend.encode(text)]

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode([int(i) for i in ids]))

    def __reduce__(self):
        return type(self), self._arguments
