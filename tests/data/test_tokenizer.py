"""Tokenizers against known ids, and files of tokenizers that are damaged or hostile."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from megatron.data.errors import TokenizerError
from megatron.data.tokenizer import TokenizerSpec

DATA = Path(__file__).parents[2] / "training_datasets"


@pytest.fixture(scope="module")
def gpt2():
    return TokenizerSpec("GPT2BPETokenizer", DATA / "gpt2-vocab.json", DATA / "gpt2-merges.txt").build()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("Hello, my dog is cute", [15496, 11, 616, 3290, 318, 13779]),
        ("a\n\nb", [64, 198, 198, 65]),
        ("", []),
    ],
)
def test_gpt2_gives_the_published_ids(gpt2, text, ids):
    assert gpt2.tokenize(text) == ids and gpt2.detokenize(ids) == text


def test_gpt2_sizes_and_round_trip(gpt2):
    assert (gpt2.vocab_size, gpt2.eod) == (50257, 50256)
    text = "Ünïcode — 日本語, tabs\tand  blanks\r\n'll"
    assert gpt2.detokenize(gpt2.tokenize(text)) == text
    assert gpt2.detokenize([50256]) == "<|endoftext|>"


def test_text_cannot_produce_end_of_document(gpt2):
    assert gpt2.eod not in gpt2.tokenize("a<|endoftext|>b")


def test_gpt2_pickles(gpt2):
    assert pickle.loads(pickle.dumps(gpt2)).tokenize("Hello world") == [15496, 995]


def test_null_tokenizer():
    tokenizer = TokenizerSpec("NullTokenizer", vocab_size=100).build()
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    assert tokenizer.tokenize("5 99") == [5, 99] and tokenizer.detokenize([5, 99]) == "5 99"


def test_a_vocabulary_must_have_room_for_the_tokenizer():
    files = (DATA / "gpt2-vocab.json", DATA / "gpt2-merges.txt")
    assert TokenizerSpec("GPT2BPETokenizer", *files, vocab_size=128256).build().vocab_size == 50257
    assert TokenizerSpec("GPT2BPETokenizer", *files, vocab_size=50257).build().eod == 50256
    with pytest.raises(TokenizerError, match="a vocabulary of 49152 with a tokenizer of 50257"):
        TokenizerSpec("GPT2BPETokenizer", *files, vocab_size=49152).build()


def test_hf_tokenizer_from_a_folder(tmp_path, gpt2):
    from transformers import GPT2TokenizerFast

    (tmp_path / "vocab.json").write_bytes((DATA / "gpt2-vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((DATA / "gpt2-merges.txt").read_bytes())
    GPT2TokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path / "hf")
    tokenizer = TokenizerSpec("HFTokenizer", tokenizer_model=tmp_path / "hf").build()
    assert (tokenizer.vocab_size, tokenizer.eod) == (50257, 50256)
    for text in ("Hello world", "To be, or not to be: that is the question:\n", "a<|endoftext|>b"):
        assert tokenizer.tokenize(text) == gpt2.tokenize(text)
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("GPT2BPETokenizer",), "--vocab-file"),
        (("GPT2BPETokenizer", DATA / "gpt2-vocab.json", "nowhere.txt"), "nowhere.txt"),
        (("GPT2BPETokenizer", DATA / "gpt2-merges.txt", DATA / "gpt2-merges.txt"), "cannot be read"),
        (("HFTokenizer",), "--tokenizer-model"),
        (("Llama2Tokenizer",), "--tokenizer-model"),
        (("HFTokenizer", None, None, DATA), "no tokenizer that transformers can read"),
        (("NullTokenizer",), "--vocab-size"),
        (("BertWordPieceCase",), "BERT"),
        (("Nonsense",), "GPT2BPETokenizer, HFTokenizer"),
    ],
)
def test_what_is_missing_is_named(arguments, message):
    with pytest.raises(TokenizerError, match=message):
        TokenizerSpec(*arguments).build()


VOCAB = b'{"a": 0, "b": 1, "<|endoftext|>": 2}'
MERGES = b"#version: 0.2\n"


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        (b"", MERGES),
        (b"\xff\xfe\0", MERGES),
        (b"[" * 50_000, MERGES),
        (b"[1]", MERGES),
        (b'{"a": "x"}', MERGES),
        (b'{"a": -5, "<|endoftext|>": 2}', MERGES),
        (b'{"a": 99999999999999999999, "<|endoftext|>": 1}', MERGES),
        (b'{"a": 0, "<|endoftext|>": 900000000}', MERGES),
        (b'{"\\ud83d": 0, "<|endoftext|>": 1}', MERGES),
        (VOCAB, b"\xff\xfe\0"),
        (VOCAB, b"#version: 0.2\na b\n"),
        (VOCAB, b"#version: 0.2\na b c\n"),
        (VOCAB, b"\x89PNG\r\n" * 50),
    ],
)
def test_a_damaged_vocabulary_is_told(vocab, merges, tmp_path):
    (tmp_path / "v.json").write_bytes(vocab)
    (tmp_path / "m.txt").write_bytes(merges)
    with pytest.raises(TokenizerError, match="vocabulary"):
        TokenizerSpec("GPT2BPETokenizer", tmp_path / "v.json", tmp_path / "m.txt").build()


@pytest.mark.parametrize("file", ["v.json", "m.txt"])
def test_a_fifo_is_no_vocabulary(file, tmp_path):
    (tmp_path / "v.json").write_bytes(VOCAB)
    (tmp_path / "m.txt").write_bytes(MERGES)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(TokenizerError, match="needs a file that is not there"):
        TokenizerSpec("GPT2BPETokenizer", tmp_path / "v.json", tmp_path / "m.txt").build()


def test_code_in_a_tokenizers_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    config = {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    read, write = os.pipe()
    os.write(write, b"y\n" * 10)  # whoever asks would be answered
    os.close(write)
    with os.fdopen(read) as answers:
        monkeypatch.setattr(sys, "stdin", answers)
        with pytest.raises(TokenizerError, match="custom code|trust_remote_code"):
            TokenizerSpec("HFTokenizer", tokenizer_model=tmp_path).build()
        assert len(answers.readlines()) == 10
    assert not (tmp_path / "executed").exists()
