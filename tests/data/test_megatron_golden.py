"""The shipped corpus gives the indices that Megatron itself gives.

The hashes are of arrays made by megatron-core 0.12.1 (its gpt_dataset.py and compiled helpers) from
training_datasets/gpt2_text_document, documents [0, 1871): an answer that no code of this project took part in.
"""

import hashlib
from pathlib import Path

import pytest

from megatron.data.blending import blending_index
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.sample_index import build_sample_index

CORPUS = Path(__file__).parents[2] / "training_datasets" / "gpt2_text_document"

# (seq_length, seed, num_samples): hashes of document_index, sample_index, shuffle_index
MEGATRON = {
    (128, 1, 19368): (
        "fd1cbf92ea1c338b98ad8ba904a46ab3",
        "0ec2d6adcd7f4b9ab7a22230e8e680a2",
        "8ebeeccafdee64f0d2fb486a7af9b66a",
    ),  # 1 epoch
    (1024, 5, 4843): (
        "da9848e5c44f87f303563f044300a893",
        "1ac756ad54feba20c0c75c14405329cc",
        "4ec2f44d58d08bd24d5d40ab4b7aa5af",
    ),  # 3 epochs, the last apart
    (37, 9, 134009): (
        "b4b2f1d7c6bf4ae16e0c78d73635c021",
        "1472dd964fc79a95c4c7b24fd8c6bf6d",
        "88e6d4cd1b36b7ef39f71c5f9a08ca13",
    ),  # 2 epochs
}
MEGATRON_BLEND = "5c74d10eee8574a8cdaca9ee0445424c"  # weights 0.2, 0.5, 0.3; 100,000 samples


def sha(*arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:32]


@pytest.mark.parametrize("case", MEGATRON, ids=str)
def test_sample_index_is_megatrons(case):
    seq_length, seed, num_samples = case
    index = build_sample_index(IndexedDataset(CORPUS).sizes, (0, 1871), num_samples, seq_length, seed)
    found = (sha(index.document_index), sha(index.sample_index), sha(index.shuffle_index))
    assert found == MEGATRON[case]


def test_blend_is_megatrons():
    assert sha(*blending_index([0.2, 0.5, 0.3], 100_000)) == MEGATRON_BLEND
