"""A NullTokenizer of N words has N + 1 ids, in preprocessing, training, masks and padding alike."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from harness.ranks import run_ranks
from matrix.recording import build, command_line
from tools.preprocess_data import main

NUM_WORDS = 50


def _data(folder: Path, *flags: str) -> Path:
    """Documents of every word, 0 to 49."""
    texts = [" ".join(str((first + i) % NUM_WORDS) for i in range(60)) for first in range(40)]
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(NUM_WORDS)]
    assert main(["--input", str(source), "--output-prefix", str(folder / "corpus"), *words, *flags]) == 0
    return folder / "corpus_text_document"


def _seen(rank: int, world_size: int, argv: list[str]):
    from megatron.training.loop import fit

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("megatron").addHandler(handler)
    run = build(argv, rank, world_size)
    batch = next(run.batches.train(0))
    rows = sum(p.shape[0] for name, p in run.live.engine.module.named_parameters() if "word_embeddings" in name)
    fit(run)
    return batch, run.config.model.vocab_size, rows, run.run_log.steps[-1].loss, warnings


def _argv(data: Path, **flags) -> list[str]:
    return command_line(data, micro_batch=8, vocab_size=NUM_WORDS, num_layers=1, iters=1, eod_mask_loss=True, **flags)


def test_the_end_of_a_document_is_one_id_past_the_words(tmp_path):
    data = _data(tmp_path, "--append-eod")
    for tp in (1, 2):
        seen = run_ranks(tp, _seen, _argv(data, tp=tp))
        batch, vocab_size, rows, loss, warnings = seen[0]
        assert vocab_size == NUM_WORDS + 1
        assert rows * tp == {1: 56, 2: 64}[tp]  # of 51, in multiples of 8 on each rank
        assert batch["tokens"].max() == NUM_WORDS
        assert torch.equal(batch["loss_mask"] == 0, batch["tokens"] == NUM_WORDS)
        assert 3 < loss < 5 and not warnings


def test_a_mask_of_an_id_that_never_occurs_is_told(tmp_path):
    [(batch, _, _, _, warnings)] = run_ranks(1, _seen, _argv(_data(tmp_path)))
    assert batch["loss_mask"].min() == 1
    [told] = warnings
    assert "--eod-mask-loss masks nothing" in told and "id 50" in told and "corpus_text_document" in told


@pytest.mark.parametrize("given, vocab_size", [({}, 50257), ({"vocab_size": 100}, 101)])
def test_a_presets_vocabulary_is_the_models(given: dict, vocab_size: int, tmp_path):
    """The published model keeps its size: the end of a document is its last id."""
    from megatron.config.arguments import parse

    argv = command_line(tmp_path / "none", **({"vocab_size": None} | given), model_preset="gpt-125m")
    assert parse(argv).config.model.vocab_size == vocab_size
