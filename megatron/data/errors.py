"""What can be wrong with training data, as named errors that carry their cure.

Every message says what is wrong, what was found, what was expected, where, and what to do.

    raise CorruptDatasetError("the .bin file is cut short", found="10 bytes", expected="20 bytes", where=path)
"""

from __future__ import annotations


class DataError(Exception):
    """Base of every error of megatron.data."""

    def __init__(
        self, what: str, *, found: object = None, expected: object = None, where: object = None, do: str | None = None
    ):
        self.what = what
        self._fields = {"found": found, "expected": expected, "where": where, "do": do}
        labels = (("found", found), ("expected", expected), ("where", where), ("what to do", do))
        super().__init__("\n".join([what] + [f"  {k}: {v}" for k, v in labels if v is not None]))

    def __reduce__(self):
        # Keyword-only arguments are lost by Exception's own pickling, and errors cross worker processes.
        return _rebuild, (type(self), self.what, {k: v and str(v) for k, v in self._fields.items()})


def _rebuild(cls: type[DataError], what: str, fields: dict) -> DataError:
    return cls(what, **fields)


class MissingDatasetError(DataError):
    """A .bin or .idx file (or both) is not there."""


class CorruptDatasetError(DataError):
    """A .bin/.idx pair is damaged, cut short, of another format, or does not belong together."""


class DatasetExistsError(DataError):
    """The output is already there; nothing is overwritten."""


class TokenRangeError(DataError):
    """A token does not fit the file's integer type."""


class VocabularyMismatchError(DataError):
    """A dataset holds token ids that the tokenizer's vocabulary does not have."""


class SplitError(DataError):
    """--split cannot be read, or leaves a wanted part without a document."""


class BlendError(DataError):
    """--data-path is not a valid list of prefixes or of weight and prefix pairs."""


class NotEnoughTokensError(DataError):
    """A part of a dataset is too small for one sample."""


class IndexCacheError(DataError):
    """The folder asked for as index cache cannot be used."""


class SamplerError(DataError):
    """A position in the sample order that cannot be: past the end, negative, or an impossible batch."""


class TokenizerError(DataError):
    """A tokenizer cannot be built from what was given."""


class InputTextError(DataError):
    """An input file of the preprocessing cannot be read as what it should be."""
