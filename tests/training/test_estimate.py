"""`pretrain_gpt.py --estimate`: what it says, of one topology and of all."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.arguments import parse
from megatron.config.errors import ConfigError
from megatron.training.estimate import estimate

ROOT = Path(__file__).resolve().parents[2]
LLAMA = "--model-preset llama-3.1-8b --micro-batch-size 1 --global-batch-size 512 --bf16 --estimate"


def _said(line: str, ranks: int = 1) -> str:
    return estimate(parse(line.split()).config, ranks)


def _listed(text: str) -> list[tuple[str, int, float, float]]:
    """(topology, ZeRO stage, peak GB, tokens/s) of each line."""
    rows = re.findall(r"^(tp\d+ pp\d+ dp\d+(?: ep\d+)?) +(\d) +([\d.]+) +[\d.]+ +([\d,]+) +[\d.]+%$", text, re.M)
    return [(name, int(zero), float(peak), float(tokens.replace(",", ""))) for name, zero, peak, tokens in rows]


def test_is_answered_at_once_and_loads_nothing():
    line = [*LLAMA.split(), "--gpus", "64", "--gpu-memory", "80"]
    program = (
        "import sys; sys.argv = ['pretrain_gpt.py', *sys.argv[1:]]; import pretrain_gpt;"
        "code = pretrain_gpt.main(sys.argv[1:]); loaded = {'torch', 'deepspeed', 'numpy'} & set(sys.modules);"
        "sys.exit(f'loaded {loaded}' if loaded or code else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program, *line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8,030,261,248 parameters" in done.stdout and len(_listed(done.stdout)) == 20


def test_stages_of_one_topology():
    said = _said(f"{LLAMA} --gpus 16 --pipeline-model-parallel-size 4 --tensor-model-parallel-size 2 --zero-stage 1")
    assert "tp2 pp4 dp2, ZeRO-1, bf16, 16 rank(s) on GPUs" in said
    peaks = [float(line.split()[-1]) for line in said.splitlines() if re.match(r"stage \d", line)]
    assert len(peaks) == 4 and peaks[0] > peaks[1] > peaks[2]  # fewer micro batches in flight
    assert "ZeRO-1, bf16" in _said(f"{LLAMA} --gpus 8")  # what low precision without ZeRO is run as
    on_cpu = _said("--model-preset tiny-gpt --micro-batch-size 2 --vocab-size 1000 --estimate", ranks=2)
    assert "dp2, ZeRO-0, fp32, 2 rank(s) on CPUs" in on_cpu


def test_what_fits_is_listed_best_first():
    roomy, tight = (_listed(_said(f"{LLAMA} --gpus 64 --gpu-memory {size}")) for size in (80, 24))
    for rows, size in ((roomy, 80), (tight, 24)):
        assert rows and all(peak <= size for _, _, peak, _ in rows)
        assert [tokens for *_, tokens in rows] == sorted((tokens for *_, tokens in rows), reverse=True)
    assert {row[0] for row in tight} != {row[0] for row in roomy}
    assert all(zero <= 1 for name, zero, *_ in roomy if "pp1 " not in name)  # DeepSpeed's pipelines take no more


def test_what_the_cost_model_must_prefer():
    """Each term shows: a slow network is kept away from gradients or stages, recomputation costs a third."""
    fast = _listed(_said(f"{LLAMA} --gpus 64 --gpu-memory 80"))
    slow = _listed(_said(f"{LLAMA} --gpus 64 --gpu-memory 80 --network-bandwidth 0.5"))
    assert slow[0][3] < fast[0][3]

    def tp_of(rows):
        return int(re.match(r"tp(\d+)", rows[0][0])[1])

    assert tp_of(slow) > tp_of(fast)
    again = _listed(_said(f"{LLAMA} --gpus 64 --gpu-memory 80 --recompute-granularity full"))
    assert 1.25 < fast[0][3] / again[0][3] < 1.4
    twice = _listed(_said(f"{LLAMA} --gpus 64 --gpu-memory 80 --peak-tflops 624"))
    assert 1.5 < twice[0][3] / fast[0][3] < 2


def test_nothing_fits():
    said = _said(f"{LLAMA} --gpus 1 --gpu-memory 8")
    assert "0 of " in said and "The smallest is tp1 pp1 dp1" in said and "More" not in said
    assert "No topology divides" in _said(f"{LLAMA.replace('512', '511')} --gpus 1024 --gpu-memory 80 --num-layers 31")


@pytest.mark.parametrize(
    "line, told",
    [
        ("--gpu-memory 80", "--gpu-memory is of how many GPUs"),
        ("--gpus 0", "--gpus is not positive"),
        ("--gpus 8 --gpu-memory -1", "--gpu-memory is not positive"),
        ("--gpus 7 --tensor-model-parallel-size 2", "not a multiple of tp x pp x sp"),
        ("--gpus 8 --tensor-model-parallel-size 5", "tensor"),
    ],
)
def test_questions_that_make_no_sense_are_told(line: str, told: str):
    with pytest.raises(ConfigError, match=told):
        _said(f"{LLAMA} {line}")


def test_without_a_vocabulary_it_asks_for_one():
    with pytest.raises(ConfigError, match="--vocab-size 50257"):
        _said("--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 1 --estimate")
