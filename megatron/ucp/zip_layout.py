"""The bytes of a zip archive around its records: stored, not compressed, as Python's zipfile lays them out.

zipfile itself writes one only through a file object of Python's, half a millisecond a record.

    file.write(local_header(entry)); file.write(content)
    file.write(central_directory(entries, position))

Source: PKWARE's APPNOTE.TXT 6.3, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass

ZIP64_LIMIT = (1 << 31) - 1
"""From here on numbers go into a field of 64 bits; zipfile's limit, not the format's."""
_MANY = (1 << 16) - 1
_IN_EXTRA = 0xFFFFFFFF
_DATE = 0x21
"""1980-01-01, the first: files of one content are one in bytes."""
_VERSION, _VERSION_64 = 20, 45
_UNIX = 3
_MODE = 0o600 << 16
_UTF8 = 0x800


@dataclass(frozen=True)
class Entry:
    name: str
    position: int
    """Of its local header."""
    num_bytes: int
    crc: int
    extra: bytes = b""

    def with_crc(self, crc: int) -> Entry:
        return dataclasses.replace(self, crc=crc)

    def with_extra(self, extra: bytes) -> Entry:
        return dataclasses.replace(self, extra=extra)

    @property
    def is_large(self) -> bool:
        return self.num_bytes > ZIP64_LIMIT

    @property
    def raw_name(self) -> tuple[bytes, int]:
        """(bytes, flags)."""
        return (self.name.encode(), 0) if self.name.isascii() else (self.name.encode(), _UTF8)


def local_header(entry: Entry) -> bytes:
    name, flags = entry.raw_name
    extra, size, version = entry.extra, entry.num_bytes, _VERSION
    if entry.is_large:
        extra, size, version = extra + struct.pack("<2H2Q", 1, 16, size, size), _IN_EXTRA, _VERSION_64
    fixed = struct.pack(
        "<4s5H3I2H", b"PK\3\4", version, flags, 0, 0, _DATE, entry.crc, size, size, len(name), len(extra)
    )
    return fixed + name + extra


def central_directory(entries: Sequence[Entry], position: int) -> bytes:
    """Of the archive whose records end at `position`, with what ends the archive."""
    content = b"".join(map(_central_header, entries))
    count, size = len(entries), len(content)
    end_of_64 = b""
    if count > _MANY or position > ZIP64_LIMIT or size > ZIP64_LIMIT:
        versions = _VERSION_64, _VERSION_64
        end_of_64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, *versions, 0, 0, count, count, size, position)
        end_of_64 += struct.pack("<4sIQI", b"PK\6\7", 0, position + size, 1)
        count, size, position = min(count, _MANY), min(size, _IN_EXTRA), min(position, _IN_EXTRA)
    return content + end_of_64 + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, position, 0)


def _central_header(entry: Entry) -> bytes:
    name, flags = entry.raw_name
    size, position, large = entry.num_bytes, entry.position, []
    if entry.is_large:
        large, size = [size, size], _IN_EXTRA
    if position > ZIP64_LIMIT:
        large, position = [*large, position], _IN_EXTRA
    extra = (struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b"") + entry.extra
    version = _VERSION_64 if large else _VERSION
    return (
        struct.pack(
            "<4s4B4H3I5H2I",
            *(b"PK\1\2", version, _UNIX, version, 0),
            *(flags, 0, 0, _DATE),
            *(entry.crc, size, size, len(name), len(extra)),
            *(0, 0, 0, _MODE, position),
        )
        + name
        + extra
    )
