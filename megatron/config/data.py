"""Where the tokens come from.

data = DataConfig(data_path=("training_datasets/gpt2_text_document",), vocab_file="v.json", merge_file="m.txt")
data.blend             # the datasets with their shares of the samples
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.config.flag import flag

if TYPE_CHECKING:
    from megatron.data.blending import BlendEntry

TOKENIZER_FILES = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    **dict.fromkeys(("HFTokenizer", "PretrainedFromHF", "HuggingFaceTokenizer"), ("tokenizer_model",)),
    **dict.fromkeys(("GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer"), ("tokenizer_model",)),
    "NullTokenizer": (),
}
"""The fields that each tokenizer needs."""


def _instead_of_tokenizer(tokenizer_type: str) -> str | None:
    from megatron.data.tokenizer import REFUSED  # late, as below; preprocessing says the same

    return REFUSED.get(tokenizer_type)


@dataclass(frozen=True)
class DataConfig:
    """Paths are relative to the working directory."""

    data_path: tuple[str, ...] = flag(
        (), help="a dataset prefix (PREFIX.bin and PREFIX.idx), or `weight prefix weight prefix ...`, also quoted"
    )
    split: str = flag("969, 30, 1", help="proportions of train, validation and test")
    data_cache_path: str | None = flag(None, help="folder of the index caches; default: beside the dataset")
    tokenizer_type: str = flag(
        "GPT2BPETokenizer", help="kind of tokenizer", choices=tuple(TOKENIZER_FILES), instead=_instead_of_tokenizer
    )
    vocab_file: str | None = flag(None, help="vocabulary of a GPT2BPETokenizer (JSON)")
    merge_file: str | None = flag(None, help="merges of a GPT2BPETokenizer (text)")
    tokenizer_model: str | None = flag(
        None,
        "--tokenizer-model",
        "--tokenizer-name-or-path",
        help="of Hugging Face's a folder, a tokenizer.json or what is in the hub's cache; a tokenizer.model of "
        "SentencePiece; the vocabulary of a TikTokenizer",
    )
    tiktoken_pattern: str = flag("v2", help="how a TikTokenizer cuts text into words", choices=("v1", "v2"))
    tiktoken_num_special_tokens: int = flag(1000, help="ids of a TikTokenizer before the others", unit="tokens")
    tiktoken_special_tokens: tuple[str, ...] = flag((), help="their names, as far as they have some")
    eod_mask_loss: bool = flag(False, help="no loss where the input is the end-of-document token")
    num_workers: int = flag(2, help="loader processes of one rank; 0 loads in the rank", unit="processes")

    @property
    def blend(self) -> tuple[BlendEntry, ...]:
        """The datasets with their shares. Raises BlendError for a --data-path that cannot be read."""
        from megatron.data.blending import parse_data_path  # late: megatron.data loads torch, this module must not

        return parse_data_path(self.data_path)

    @property
    def split_weights(self) -> tuple[float, ...]:
        """Train, validation, test as written, missing ones 0. Raises ValueError on something else."""
        weights = [float(part) for part in self.split.replace("/", ",").split(",") if part.strip()]
        return tuple(weights + [0.0] * (3 - len(weights)))
