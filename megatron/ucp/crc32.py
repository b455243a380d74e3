"""CRC-32 as zlib counts it: in the compiled kernel where it was built and the processor multiplies without carries,
many times as fast; else zlib's.

    crc32(b"second", crc32(b"first"))
    crc32_join(first, second, len_of_second)         # of two stretches from the CRC of each
"""

from __future__ import annotations

import zlib
from typing import Any

from megatron.ucp import native


def crc32(content: Any, crc: int = 0) -> int:
    """`content`: contiguous bytes of any kind."""
    is_folded = native.kernel is not None and native.kernel.folds_crc32
    return native.kernel.crc32(content, crc) if is_folded else zlib.crc32(content, crc)  # type: ignore[union-attr]


def crc32_join(first: int, second: int, second_length: int) -> int:
    """zlib's crc32_combine, which Python does not offer."""
    if native.kernel is not None:
        return native.kernel.crc32_join(first, second, second_length)
    # Appending n zero bytes multiplies by x^(8n) modulo the polynomial, bit-reflected: x^0 is the highest bit.
    power, factor, count = 1 << 31, 1 << 23, second_length
    while count:
        if count & 1:
            power = _multiply(power, factor)
        factor = _multiply(factor, factor)
        count >>= 1
    return _multiply(power, first) ^ second


def _multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ 0xEDB88320 if b & 1 else b >> 1
    return product
