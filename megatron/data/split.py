"""Divide the documents of a dataset into train, valid and test by --split, with Megatron's rounding.

Whole documents, in file order, the first part to train, the last to test.

    split_documents("949,50,1", 1972)      # [(0, 1871), (1871, 1970), (1970, 1972)]
"""

from __future__ import annotations

import math

from megatron.data.errors import SplitError

PARTS = ("train", "valid", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, valid, test, summing to 1. "949,50,1", "90/10" and "100" are all understood."""
    separator = "," if "," in split else "/"
    try:
        weights = [float(part) for part in split.split(separator)]
    except ValueError:
        weights = []
    is_valid = 0 < len(weights) <= len(PARTS) and all(math.isfinite(w) and w >= 0 for w in weights)
    if not is_valid or sum(weights) <= 0:
        raise SplitError(
            "--split cannot be read",
            found=repr(split),
            expected="one to three numbers >= 0 with commas between them, not all 0",
            where="--split",
            do="for example 949,50,1",
        )
    train, valid, test = weights + [0.0] * (len(PARTS) - len(weights))
    total = train + valid + test
    return train / total, valid / total, test / total


def split_documents(split: str, num_documents: int) -> list[tuple[int, int]]:
    """[start, stop) of each of PARTS."""
    bounds = [0]
    for share in parse_split(split):
        bounds.append(bounds[-1] + int(round(share * num_documents)))
    # Megatron moves every bound by what rounding gave too much or too little.
    excess = bounds[-1] - num_documents
    bounds = [0] + [min(max(bound - excess, 0), num_documents) for bound in bounds[1:]]
    return list(zip(bounds, bounds[1:]))
