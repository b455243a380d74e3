"""The files shipped in training_datasets/ are whole and are what its README says."""

import hashlib
import re
from pathlib import Path

import pytest

from megatron.data.gpt_dataset import build_datasets
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.tokenizer import GPT2BPETokenizer

DATA = Path(__file__).parents[2] / "training_datasets"
SUMS = dict(reversed(line.split()) for line in (DATA / "SHA256SUMS").read_text().splitlines())


@pytest.mark.parametrize("name", SUMS)
def test_sha256(name):
    assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == SUMS[name]


def test_all_are_listed_and_small_enough_for_git():
    assert sorted(SUMS) == ["gpt2-merges.txt", "gpt2-vocab.json", "gpt2_text_document.bin", "gpt2_text_document.idx"]
    assert sum(p.stat().st_size for p in DATA.iterdir() if p.is_file()) < 12_000_000


def test_numbers_of_the_readme():
    dataset = IndexedDataset(DATA / "gpt2_text_document")
    readme = (DATA / "README.md").read_text()
    together = re.search(r"\| together \| ([\d,]+) \| [\d,]+ \| ([\d,]+) \|", readme)
    assert [int(x.replace(",", "")) for x in together.groups()] == [len(dataset), dataset.num_tokens]
    assert f"{dataset.sizes.min()} tokens, the longest {dataset.sizes.max():,}" in readme


def test_documents_read_as_english_and_end_with_end_of_document(tmp_path):
    tokenizer = GPT2BPETokenizer(DATA / "gpt2-vocab.json", DATA / "gpt2-merges.txt")
    dataset = IndexedDataset(DATA / "gpt2_text_document")
    ends = dataset.tokens[dataset.pointers // 2 + dataset.sizes - 1]
    assert (ends == tokenizer.eod).all() and (dataset.tokens == tokenizer.eod).sum() == len(dataset)
    begins = [tokenizer.detokenize(dataset.get(i, 0, 12)) for i in range(len(dataset))]
    assert sum(text.startswith("Macbeth, ACT") for text in begins) == 28
    genesis = next(i for i, text in enumerate(begins) if text.startswith("Genesis 1\n"))
    assert tokenizer.detokenize(dataset[genesis]).startswith(
        "Genesis 1\n\n1 In the beginning God created the heaven and the earth.\n2 And the earth was without form"
    )
    text = tokenizer.detokenize(dataset.tokens[:200_000])
    assert not re.search(r"[*_#\\]", text.replace("<|endoftext|>", ""))
    train, valid, test = build_datasets(
        [str(DATA / "gpt2_text_document")], "949,50,1", 128, 1234, (800, 80, 8), tmp_path, tokenizer.vocab_size
    )
    assert len(train) >= 800 and len(valid) >= 80 and len(test) >= 8
