"""From text to a trained step with the tokenizers of SentencePiece, tiktoken and Hugging Face's: the same flags in
preprocessing and in training, ids that are the library's, rows of the embedding that are the tokenizer's."""

import base64
import json
from pathlib import Path

import pytest

from harness.ranks import run_ranks
from matrix.recording import build, command_line, curves
from tools.preprocess_data import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PARAGRAPHS = [part for part in TEXT.split("\n\n") if len(part) > 40]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    (path / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in PARAGRAPHS))
    return path


def sentence_piece(folder):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    options = {"vocab_size": 391, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2}
    SentencePieceTrainer.train(input=str(ROOT / "README.md"), model_prefix=str(folder / "m"), **options)
    library = SentencePieceProcessor(model_file=str(folder / "m.model"))
    return folder / "m.model", library.encode


def tiktoken_bytes(folder):
    """Bytes alone: every id is a byte, after 30 special tokens."""
    entries = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": ""} for i in range(256)]
    (folder / "vocab.json").write_text(json.dumps(entries))
    return folder / "vocab.json", lambda text: [30 + byte for byte in text.encode()]


def hugging_face(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PARAGRAPHS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder, lambda text: tokenizer.encode(text).ids


CASES = {
    "GPTSentencePieceTokenizer": (sentence_piece, {}, 391, 2, []),
    "Llama2Tokenizer": (sentence_piece, {}, 391, 2, [1]),
    "TikTokenizer": (tiktoken_bytes, {"vocab_size": 303, "tiktoken_num_special_tokens": 30}, 303, 2, []),
    "HFTokenizer": (hugging_face, {}, 380, 0, []),
}
"""(made by, flags, rows, the end of a document, what comes before one)."""


def _trained(rank, world_size, argv):
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    tokens = [batch["tokens"].tolist() for batch, _ in zip(run.batches.train(0), range(200))]
    fit(run)
    rows = run.live.atlas.layouts["embedding.word_embeddings.weight"].shape[0]
    return tokens, run.config.model.vocab_size, rows, curves(run, {})


@pytest.mark.parametrize("kind", CASES)
def test_from_text_to_a_step(kind, corpus, tmp_path):
    make, more, num_rows, eod, first = CASES[kind]
    model, encode = make(tmp_path)
    flags = {"tokenizer_type": kind, "tokenizer_model": model, **more}
    of_tokenizer = [part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    prefix = tmp_path / "out"
    arguments = ["--input", str(corpus / "text.jsonl"), "--output-prefix", str(prefix), "--append-eod", *of_tokenizer]
    assert main(arguments) == 0
    values = {"vocab_size": None, "iters": 2, "no_pipeline_parallel": True, **flags}
    argv = command_line(f"{prefix}_text_document", **values)
    tokens, vocab_size, rows, alone = run_ranks(1, _trained, argv)[0]
    assert vocab_size == rows == num_rows
    # What is trained on are the library's ids, one paragraph after the other, each with its end.
    documents = [[*first, *encode(part), eod] for part in PARAGRAPHS]
    stream = [" ".join(map(str, document)) for document in documents]
    assert len(tokens) == 200
    for batch in tokens:
        for sample in batch:
            pieces = _documents_of(sample, eod)
            assert all(any(f" {piece} " in f" {document} " for document in stream) for piece in pieces if piece), sample
    assert any(eod in sample for batch in tokens for sample in batch)
    # More rows than tokens, and a cut vocabulary: the same losses.
    _, _, padded_rows, padded = run_ranks(1, _trained, [*argv, "--pad-vocab-size-to", "400"])[0]
    assert padded_rows == 400 and padded.losses[1] > alone.losses[1]  # a softmax over more rows
    cut = run_ranks(2, _trained, command_line(f"{prefix}_text_document", **values, tp=2))[0][-1]
    assert cut.losses == pytest.approx(alone.losses, abs=2e-5) and sorted(cut.losses) == [1, 2]


def _documents_of(sample, eod):
    """Text of ids between the ends, each with the end that it has."""
    pieces, current = [], []
    for token in sample:
        current.append(token)
        if token == eod:
            pieces.append(" ".join(map(str, current)))
            current = []
    return [*pieces, " ".join(map(str, current))]
