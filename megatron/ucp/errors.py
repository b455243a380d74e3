"""What can be wrong with a checkpoint, as named errors that carry their cure.

Every error says what is wrong, what was found, what was expected, where, and what to do; and a
check collects all of its findings before it raises, so that a user repairs a folder once and not ten times.

    raise MissingFileError("2 files are missing", found=["a.pt"], where=folder, do="copy them from the other node")
"""

from __future__ import annotations

from collections.abc import Iterable

_MAX_LISTED = 20
_MAX_ITEM, _MAX_TEXT = 400, 4000
"""Characters of one of several and of one alone: what a file says must not fill the terminal."""


def listed(items: Iterable[object], limit: int = _MAX_LISTED, is_sorted: bool = False) -> str:
    """Sorted (`is_sorted`: as they come), comma-separated, cut off after `limit` with the count of what is left."""
    names = [_clipped(str(item), _MAX_ITEM) for item in items]
    names = names if is_sorted else sorted(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f", ... and {rest} more" if rest > 0 else "")


def _clipped(text: str, size: int) -> str:
    """No longer than that, and without what a terminal would obey."""
    if len(text) > size:
        text = f"{text[:size]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class UcpError(Exception):
    """Base of every error of megatron.ucp."""

    def __init__(
        self, what: str, *, found: object = None, expected: object = None, where: object = None, do: str | None = None
    ):
        self.what, self.found, self.expected, self.where, self.do = what, found, expected, where, do
        parts = [_clipped(what, _MAX_TEXT)]
        for label, value in (("found", found), ("expected", expected), ("where", where), ("what to do", do)):
            if value is not None:
                text = listed(value) if isinstance(value, (list, tuple, set, frozenset)) else str(value)
                parts.append(f"  {label}: {_clipped(text, _MAX_TEXT)}")
        super().__init__("\n".join(parts))

    def __reduce__(self):
        # Keyword-only arguments are lost by Exception's own pickling, and errors cross worker processes.
        fields = {"found": self.found, "expected": self.expected, "where": self.where, "do": self.do}
        fields = {
            key: value if value is None or isinstance(value, (list, tuple)) else str(value)
            for key, value in fields.items()
        }
        return _rebuild, (type(self), self.what, fields)


def _rebuild(cls: type[UcpError], what: str, fields: dict) -> UcpError:
    return cls(what, **fields)


class LayoutError(UcpError):
    """A parameter cannot be cut as declared, or its shards do not fit together."""


class ManifestError(UcpError):
    """ucp.json is unreadable, of an unknown version, or contradicts itself."""


class NotACheckpointError(UcpError):
    """The folder is no committed checkpoint of a known kind."""


class MissingFileError(UcpError):
    """Files that the checkpoint's topology calls for are not there."""


class CorruptFileError(UcpError):
    """A file's size, checksum or structure is not what was written."""


class UnsafePathError(UcpError):
    """A name from a file leads out of its folder, through a link, or to what is no regular file."""


class UnsafePickleError(UcpError):
    """A file asks to run code, or holds a class outside the allow-list."""


class SourceError(UcpError):
    """A Source does not hold what was asked for: unknown name, gap, overlap."""


class ReplicaMismatchError(SourceError):
    """Copies of one parameter that must be equal are not."""


class DigestMismatchError(UcpError):
    """The state is not the one that was saved."""


class UnsupportedCheckpointError(UcpError):
    """A known kind of checkpoint that this version does not read."""


class ChangedWhileReadError(UcpError):
    """The folder is not the one that was opened: a save replaced it, or somebody changed it."""


class OutputExistsError(UcpError):
    """The output is already there; nothing is overwritten."""


class OwnedByOtherError(OutputExistsError):
    """Another process is writing there, or what is there is not ours to remove."""


class NotEnoughSpaceError(UcpError):
    """The disk cannot take the output."""
