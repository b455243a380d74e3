"""tools/preprocess_data.py from text to tokens, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.tokenizer import GPT2BPETokenizer
from tools.preprocess_data import main

DATA = Path(__file__).parents[2] / "training_datasets"
GPT2 = ["--vocab-file", str(DATA / "gpt2-vocab.json"), "--merge-file", str(DATA / "gpt2-merges.txt")]
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]


def documents(prefix):
    dataset = IndexedDataset(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


def jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def test_jsonl_end_to_end(tmp_path, capsys):
    source = jsonl(tmp_path / "a.jsonl", ["Hello world", "", "Hello, my dog is cute\n"])
    prefix = tmp_path / "out" / "corpus"
    assert main(["--input", source, "--output-prefix", str(prefix), "--append-eod", *GPT2]) == 0
    assert documents(f"{prefix}_text_document") == [[15496, 995, 50256], [15496, 11, 616, 3290, 318, 13779, 198, 50256]]
    assert IndexedDataset(f"{prefix}_text_document").dtype == np.uint16
    out, err = capsys.readouterr()
    assert "2 documents, 11 tokens" in out and "1 empty documents left out" in out and "docs/s" not in err


def test_workers_do_not_change_the_output(tmp_path, capsys):
    rng = np.random.RandomState(0)
    texts = [" ".join(map(str, rng.randint(0, 1000, rng.randint(1, 400)))) for _ in range(1500)]
    inputs = [jsonl(tmp_path / "a.jsonl", texts[:900]), jsonl(tmp_path / "b.jsonl", texts[900:])]
    for workers in ("1", "2"):
        prefix = str(tmp_path / f"w{workers}")
        arguments = ["--input", *inputs, "--output-prefix", prefix, "--workers", workers, "--log-interval", "500"]
        assert main(arguments + NULL + ["--append-eod"]) == 0
    for ending in (".bin", ".idx"):
        one, two = (tmp_path / f"w{w}_text_document{ending}" for w in "12")
        assert one.read_bytes() == two.read_bytes()
    assert documents(tmp_path / "w2_text_document") == [[*map(int, text.split()), 1000] for text in texts]
    assert "s left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("block", ["one\ntwo", "three", "four\nfive"]),
        ("line", ["one", "two", "three", "four", "five"]),
        ("file", ["one\ntwo\n\n\nthree\n \nfour\nfive"]),
    ],
)
def test_txt(tmp_path, kind, expected):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\none\r\ntwo\n\n\nthree\n \nfour\nfive")
    prefix = str(tmp_path / "t")
    assert main(["--input", str(tmp_path / "a.txt"), "--output-prefix", prefix, "--txt-documents", kind, *GPT2]) == 0
    tokenizer = GPT2BPETokenizer(DATA / "gpt2-vocab.json", DATA / "gpt2-merges.txt")
    assert [tokenizer.detokenize(ids) for ids in documents(f"{prefix}_text_document")] == expected


def test_several_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "1 2", "a": "3"}\n{"q": "4", "a": "5 6"}\n')
    prefix = str(tmp_path / "k")
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", prefix, "--json-keys", "q", "a", *NULL]
    assert main(arguments) == 0
    assert documents(f"{prefix}_q_document") == [[1, 2], [4]]
    assert documents(f"{prefix}_a_document") == [[3], [5, 6]]


BAD_INPUTS = {
    "not-json": (b'{"text": "1"}\nplain text\n', "a.jsonl, line 2"),
    "no-key": (b'{"text": "1"}\n\n{"body": "2"}\n', "keys ['body']"),
    "not-a-string": (b'{"text": 3}\n', "keys ['text']"),
    "list": (b"[1]\n", "list"),
    "not-utf8": (b'{"text": "1"}\n{"text": "\xff"}\n', "byte 0xff"),
    "id-outside": (b'{"text": "1001"}\n', "ids in [1001, 1001]"),
    "nothing": (b"\n\n", "no document"),
    "half-a-surrogate-pair": (b'{"text": "1"}\n{"text": "2 \\ud83d"}\n', "half a surrogate pair"),
    "too-deep": (b'{"text": ' + b"[" * 100_000 + b"\n", "a line is not JSON"),
    "a-long-number": (b'{"text": "1", "n": ' + b"1" * 5000 + b"}\n", "a line is not JSON"),
    "no-number": (b'{"text": "1 two"}\n', "the tokenizer cannot take a document"),
}


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("name", ["not-json"])
def test_bad_input_through_workers(tmp_path, capsys, name, workers):
    _refused(tmp_path, capsys, name, workers)


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, capsys, name):
    _refused(tmp_path, capsys, name, "1")


def _refused(tmp_path, capsys, name, workers):
    data, message = BAD_INPUTS[name]
    (tmp_path / "a.jsonl").write_bytes(data)
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "o"), "--workers", workers]
    assert main(arguments + NULL) == 1
    err = capsys.readouterr().err
    assert "InputTextError" in err and message in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_broken_text_is_replaced_and_counted(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "Hello \\ud83d world"}\n{"text": "Hello \xff"}\n{"text": "Hello"}\n')
    prefix = str(tmp_path / "o")
    assert main(["--input", str(tmp_path / "a.jsonl"), "--output-prefix", prefix, "--replace-broken-text", *GPT2]) == 0
    tokenizer = GPT2BPETokenizer(DATA / "gpt2-vocab.json", DATA / "gpt2-merges.txt")
    found = [tokenizer.detokenize(ids) for ids in documents(f"{prefix}_text_document")]
    assert found == ["Hello \ufffd world", "Hello \ufffd", "Hello"]
    assert "broken text replaced in 2" in capsys.readouterr().out


def test_a_line_with_text_under_some_keys_only_is_refused(tmp_path, capsys):
    """It used to be left out with its body, and counted as empty."""
    (tmp_path / "a.jsonl").write_text('{"title": "1", "body": "2"}\n{"title": "", "body": "3"}\n')
    keys = ["--json-keys", "title", "body", *NULL]
    assert main(["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "o"), *keys]) == 1
    err = capsys.readouterr().err
    assert "a.jsonl, line 2" in err and "title empty" in err
    (tmp_path / "a.jsonl").write_text('{"title": "1", "body": "2"}\n{"title": "", "body": ""}\n')
    assert main(["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "o"), *keys]) == 0
    assert "1 empty documents left out" in capsys.readouterr().out


def test_files_that_cannot_be(tmp_path, capsys):
    source = jsonl(tmp_path / "a.jsonl", ["1"])
    text = tmp_path / "a.txt"
    text.write_text("1")
    (tmp_path / "a.csv").write_text("1")
    prefix = ["--output-prefix", str(tmp_path / "o")]
    assert main(["--input", str(tmp_path / "no.jsonl"), *prefix, *NULL]) == 1
    assert main(["--input", str(tmp_path / "a.csv"), *prefix, *NULL]) == 1
    assert main(["--input", str(text), "--json-keys", "b", *prefix, *NULL]) == 1
    assert main(["--input", source, *prefix, "--vocab-file", "nowhere", "--merge-file", "nowhere"]) == 1
    assert not list(tmp_path.glob("o*"))
    assert main(["--input", source, *prefix, *NULL]) == 0
    before = (tmp_path / "o_text_document.bin").read_bytes()
    capsys.readouterr()
    assert main(["--input", source, *prefix, *NULL]) == 1
    assert "DatasetExistsError" in capsys.readouterr().err
    assert (tmp_path / "o_text_document.bin").read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--split-sentences"], "BERT"),
        (["--dataset-impl", "lazy"], "only mmap"),
        (["--append-eot"], "did you mean --append-eod?"),
        (["--tokenizer-type", "BertWordPieceCase"], "BERT"),
        (["--workers", "0"], "at least 1"),
    ],
)
def test_usage_errors(tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as caught:
        main(["--input", "x.jsonl", "--output-prefix", str(tmp_path / "o"), *extra])
    assert caught.value.code == 2 and message in capsys.readouterr().err
