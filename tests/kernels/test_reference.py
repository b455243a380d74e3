"""The torch reference against the truth."""

import pytest

from kernels.cases import CASES, DTYPES, distance, outcome, sharded_cross_entropy, truth_of
from megatron.kernels import reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_against_the_truth(case, dtype, monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE_CPU", 150)  # several blocks
    is_sharded = case.operation == "cross_entropy"
    function = sharded_cross_entropy(reference) if is_sharded else getattr(reference, case.operation)
    assert distance(outcome(function, case, dtype, "cpu"), truth_of(case, dtype), dtype) <= 1
