"""Tokenizers of Hugging Face's, from a folder, a tokenizer.json, or the cache of what was downloaded before.

tokenizer = HFTokenizer("SmolLM2-135M")
tokenizer = HFTokenizer("SmolLM2-135M/tokenizer.json")
tokenizer = HFTokenizer("HuggingFaceTB/SmolLM2-135M")       # only where it is in the hub's cache already
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.data.errors import TokenizerError

_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
"""What a tokenizer.json alone may call the end of a document: it does not say which of its tokens that is."""


MAX_GAPS = 16
"""Times as many ids as tokens; published vocabularies leave a few free, not most of them."""


class HFTokenizer:
    """Never downloads, and runs no code from the folder, nor asks whether it should. The vocabulary counts added tokens
    too."""

    def __init__(self, name_or_path: str | Path):
        self._name_or_path = str(name_or_path)
        try:
            self._backend = _loaded(self._name_or_path)
        except Exception as error:
            raise TokenizerError(
                "there is no tokenizer that transformers can read",
                found=str(error).splitlines()[0] if str(error) else type(error).__name__,
                expected="a folder with tokenizer.json and tokenizer_config.json, a tokenizer.json, or a model of the "
                "hub that was downloaded before",
                where=name_or_path,
                do="give the model's folder as --tokenizer-model; nothing is downloaded at run time",
            ) from error
        if self._backend.eos_token_id is None:
            raise TokenizerError(
                "the tokenizer has no end-of-sequence token, which ends documents",
                found="eos_token is not set",
                expected="an eos_token",
                where=f"{name_or_path}/tokenizer_config.json",
                do='add "eos_token"',
            )
        # Ids may leave gaps: the last one decides how many rows there are.
        self.vocab_size = max(len(self._backend), 1 + max(self._backend.get_vocab().values(), default=0))
        if self.vocab_size > MAX_GAPS * len(self._backend):
            raise TokenizerError(
                "the vocabulary's ids leave gaps, and every id up to the last takes a row of the embedding",
                found=f"{len(self._backend)} tokens, the last id {self.vocab_size - 1}",
                expected=f"ids from 0 to about {len(self._backend) - 1}",
                where=name_or_path,
                do="number the tokens anew, or give the tokenizer that the data was made with",
            )
        self.eod: int = self._backend.eos_token_id

    def tokenize(self, text: str) -> list[int]:
        # Special tokens in the text are text; none are added at the ends: --append-eod does that.
        return self._backend(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def __reduce__(self):
        return type(self), (self._name_or_path,)


def _loaded(name_or_path: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds to import: only who asks for it pays

    if not Path(name_or_path).is_file():
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True, trust_remote_code=False)
    backend = PreTrainedTokenizerFast(tokenizer_file=name_or_path)
    known = [token for token in _ENDS if token in backend.get_vocab()]
    if len(known) != 1:
        raise ValueError(
            f"a tokenizer.json does not say which token ends a document, and of {', '.join(_ENDS)} it has "
            f"{', '.join(known) or 'none'}: give the folder, with its tokenizer_config.json"
        )
    backend.eos_token = known[0]
    return backend
