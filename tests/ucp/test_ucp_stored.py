"""Tensors that are stored otherwise than in order: copies in order are those of numpy and torch."""

import numpy as np
import pytest
import torch

from megatron.ucp.stored import StoredTensor, in_order


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", "complex128"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (16, 1024), (17, 1025), (70, 3000), (3000, 70), (0, 5)])
def test_a_transposed_matrix_is_copied_whole(dtype, shape):
    """Sizes at, below and above those of the blocks."""
    matrix = np.random.default_rng(1).integers(0, 255, shape).astype(dtype)
    copy = in_order(matrix.T)
    assert copy.flags.c_contiguous and copy.dtype == matrix.dtype
    assert np.array_equal(copy, matrix.T)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(7.0),
        np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(40.0).reshape(5, 8)[::2, ::3],
        np.asfortranarray(np.arange(6.0).reshape(2, 3))[:, ::2],
        np.broadcast_to(np.arange(3.0), (4, 3)),
        np.float64(3.0),
    ],
    ids=["vector", "cube", "every second", "part of a transposed one", "repeated", "number"],
)
def test_everything_else_is_numpys_copy(values):
    expected = np.ascontiguousarray(values)
    copy = in_order(values)
    assert np.array_equal(copy, expected) and copy.shape == expected.shape and copy.flags.c_contiguous


def test_a_stored_tensor_of_other_strides_is_read_in_order():
    matrix = torch.arange(40 * 2000, dtype=torch.float32).view(40, 2000).t()
    stored = StoredTensor.of_torch(matrix)
    assert np.array_equal(stored.flat().array(), matrix.contiguous().view(-1).numpy())
