"""Tokenizers of SentencePiece, tiktoken and Hugging Face's against their libraries, and files that are none."""

import base64
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import regex

from megatron.data.errors import TokenizerError
from megatron.data.preprocess import PreprocessJob, preprocess
from megatron.data.tiktoken_tokenizer import PATTERNS
from megatron.data.tokenizer import TokenizerSpec

ROOT = Path(__file__).parents[2]
TEXTS = (
    "Hello world",
    "To be, or not to be: that is the question.\n\nTwice  spaced",
    "Ünïcode — 日本語 12345",
    "</s> <s>",
    "",
)


# -- SentencePiece -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _trained(tmp_path_factory.mktemp("sp"))


def _trained(folder, **options):
    from sentencepiece import SentencePieceTrainer

    options = {"vocab_size": 400, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2, **options}
    SentencePieceTrainer.train(input=str(ROOT / "README.md"), model_prefix=str(folder / "m"), **options)
    return folder / "m.model"


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_gives_the_librarys_ids(model, text):
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(model))
    gpt = TokenizerSpec("GPTSentencePieceTokenizer", tokenizer_model=model).build()
    llama = TokenizerSpec("Llama2Tokenizer", tokenizer_model=model).build()
    expected = library.encode(text)
    assert gpt.tokenize(text) == expected and llama.tokenize(text) == [1, *expected]
    assert gpt.eod == llama.eod == 2 and gpt.vocab_size == llama.vocab_size == 400
    assert gpt.detokenize(expected) == llama.detokenize([1, *expected]) == library.decode(expected)
    assert 2 not in expected  # "</s>" in a text is text
    assert pickle.loads(pickle.dumps(llama)).tokenize(text) == [1, *expected]


def test_a_model_without_the_tokens_that_are_needed(tmp_path):
    model = _trained(tmp_path, eos_id=-1, bos_id=-1)
    with pytest.raises(TokenizerError, match="no eos"):
        TokenizerSpec("GPTSentencePieceTokenizer", tokenizer_model=model).build()
    with pytest.raises(TokenizerError, match="no eos and no bos"):
        TokenizerSpec("Llama2Tokenizer", tokenizer_model=model).build()


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"PK\3\4", b"{}"])
def test_no_sentencepiece_model(content, tmp_path):
    (tmp_path / "m.model").write_bytes(content)
    with pytest.raises(TokenizerError, match="no SentencePiece model"):
        TokenizerSpec("Llama2Tokenizer", tokenizer_model=tmp_path / "m.model").build()


# -- tiktoken ----------------------------------------------------------------------------------------------------------

MERGES = [b"th", b"the", b" the", b"or", b"12", "日".encode()[:2], "日".encode()]


def _entry(rank, token):
    return {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="ignore")}


ENTRIES = [_entry(rank, token) for rank, token in enumerate([*(bytes([i]) for i in range(256)), *MERGES])]


def _vocabulary(folder, entries=None):
    path = folder / "vocab.json"
    path.write_text(json.dumps(ENTRIES if entries is None else entries))
    return path


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_tiktoken_ids_are_ranks_after_the_special_tokens(text, pattern, tmp_path):
    path = _vocabulary(tmp_path)
    spec = TokenizerSpec("TikTokenizer", tokenizer_model=path, vocab_size=300, tiktoken_num_special_tokens=20,
                         tiktoken_pattern=pattern)  # fmt: skip
    tokenizer = spec.build()
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text and tokenizer.vocab_size == 300
    assert all(20 <= i < 20 + len(ENTRIES) for i in ids)
    # By words, each merged by rank: byte-pair encoding written anew.
    expected = [rank for word in regex.findall(_UPSTREAMS[pattern], text) for rank in _merged(word.encode())]
    assert ids == [20 + rank for rank in expected]
    assert tokenizer.eod == 2 and tokenizer.detokenize([2, 1, 5]) == "</s><s><SPECIAL_5>"
    assert pickle.loads(pickle.dumps(tokenizer)).tokenize(text) == ids


_UPSTREAMS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def _merged(word):
    ranks = {token: 256 + i for i, token in enumerate(MERGES)}
    parts = [bytes([b]) for b in word]
    while True:
        pairs = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        if not pairs or min(pairs)[0] == 1 << 30:
            return [part[0] if len(part) == 1 else ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_tiktokens_special_tokens(tmp_path):
    path = _vocabulary(tmp_path)
    names = ("<unk>", "<pad>", "</s>", "<s>")
    spec = TokenizerSpec("TikTokenizer", tokenizer_model=path, vocab_size=300, tiktoken_num_special_tokens=4,
                         tiktoken_special_tokens=names)  # fmt: skip
    assert spec.build().detokenize([0, 1, 2, 3]) == "".join(names)
    for wrong in (("<unk>", "<s>"), (*names, "<s>")):
        with pytest.raises(TokenizerError, match="special tokens do not fit"):
            TokenizerSpec("TikTokenizer", tokenizer_model=path, vocab_size=300, tiktoken_num_special_tokens=9,
                          tiktoken_special_tokens=wrong).build()  # fmt: skip
    with pytest.raises(TokenizerError, match="special tokens do not fit"):
        TokenizerSpec("TikTokenizer", tokenizer_model=path, vocab_size=300).build()  # 1000 places in 300


def test_a_vocabulary_is_cut_where_there_is_no_room(tmp_path):
    spec = TokenizerSpec("TikTokenizer", tokenizer_model=_vocabulary(tmp_path), vocab_size=260,
                         tiktoken_num_special_tokens=3)  # fmt: skip
    assert max(spec.build().tokenize("the 12")) < 260


@pytest.mark.parametrize(
    "entries",
    [
        {},
        [],
        ENTRIES[:255],
        [*ENTRIES[:5], ENTRIES[6], *ENTRIES[6:]],
        [*ENTRIES, ENTRIES[-1]],
        [{**ENTRIES[0], "token_bytes": "!!"}, *ENTRIES[1:]],
        [1, *ENTRIES[1:]],
        [{"rank": 0}, *ENTRIES[1:]],
    ],
)
def test_no_vocabulary_of_tiktoken(entries, tmp_path):
    spec = TokenizerSpec("TikTokenizer", tokenizer_model=_vocabulary(tmp_path, entries), vocab_size=400,
                         tiktoken_num_special_tokens=5)  # fmt: skip
    with pytest.raises(TokenizerError, match="no vocabulary of a TikTokenizer"):
        spec.build()


# -- Hugging Face's ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("hf")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train([str(ROOT / "README.md")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<pad>").save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["HFTokenizer", "PretrainedFromHF", "HuggingFaceTokenizer"])
def test_a_folder_by_each_of_its_names(kind, folder):
    tokenizer = TokenizerSpec(kind, tokenizer_model=folder).build()
    assert tokenizer.vocab_size == 400 and tokenizer.eod == 1  # as tokenizer_config.json says, not as it looks
    assert tokenizer.eod not in tokenizer.tokenize("<pad><|endoftext|>")


def test_a_tokenizer_json_alone(folder, tmp_path):
    tokenizer = TokenizerSpec("HFTokenizer", tokenizer_model=folder / "tokenizer.json").build()
    whole = TokenizerSpec("HFTokenizer", tokenizer_model=folder).build()
    assert tokenizer.eod == 0 and all(tokenizer.tokenize(text) == whole.tokenize(text) for text in TEXTS)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "</s>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="does not say which token ends a document"):
        TokenizerSpec("HFTokenizer", tokenizer_model=tmp_path / "tokenizer.json").build()


def test_ids_that_would_take_a_billion_rows(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    word = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][word] = 900_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="leave gaps|no tokenizer that transformers can read"):
        TokenizerSpec("HFTokenizer", tokenizer_model=tmp_path / "tokenizer.json").build()


def test_what_the_hubs_cache_has_and_nothing_is_downloaded(folder, tmp_path):
    snapshot = tmp_path / "models--someone--model/snapshots/0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (snapshot / "config.json").write_text('{"model_type": "llama"}')  # whose tokenizer it is, transformers asks first
    (tmp_path / "models--someone--model/refs").mkdir()
    (tmp_path / "models--someone--model/refs/main").write_text(snapshot.name)
    program = (
        "from megatron.data.tokenizer import TokenizerSpec\n"
        "print(TokenizerSpec('PretrainedFromHF', tokenizer_model='someone/model').build().vocab_size)\n"
        "try: TokenizerSpec('PretrainedFromHF', tokenizer_model='someone/other').build()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "https_proxy": "http://0.0.0.0:1",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("400\nTokenizerError"), done.stdout + done.stderr
    assert "nothing is downloaded" in done.stdout


def test_preprocessing_takes_them_all(model, folder, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXTS[1]}) + "\n")
    specs = (
        TokenizerSpec("Llama2Tokenizer", tokenizer_model=str(model)),
        TokenizerSpec("HFTokenizer", tokenizer_model=str(folder)),
        TokenizerSpec("TikTokenizer", tokenizer_model=str(_vocabulary(tmp_path)), vocab_size=2000),
    )
    from megatron.data.indexed_dataset import IndexedDataset

    for number, spec in enumerate(specs):
        job = PreprocessJob((str(tmp_path / "a.jsonl"),), str(tmp_path / f"out{number}"), spec, append_eod=True)
        preprocess(job)
        tokenizer = spec.build()
        found = IndexedDataset(tmp_path / f"out{number}_text_document")[0].tolist()
        assert found == [*tokenizer.tokenize(TEXTS[1]), tokenizer.eod]
