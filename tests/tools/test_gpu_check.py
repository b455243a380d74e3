"""tools/gpu_check.py rehearsed on a CPU, and that it sees what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_check
from tools.gpu_check import FAILED, NOT_RUN, OK, Check, Row

ROOT = Path(__file__).resolve().parents[2]


def test_the_rehearsal_finds_everything_in_order(tmp_path):
    told = tmp_path / "table.md"
    command = [sys.executable, ROOT / "tools/gpu_check.py", "--rehearsal", "--markdown", told]
    done = subprocess.run(
        [*command, "--only", "training", "journey", "save"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
    rows = [line.split(" | ") for line in told.read_text().splitlines() if line.startswith("| ")][1:]
    assert [verdict.strip(" |") for *_, verdict in rows] == ["ok"] * 6
    assert any("digest" in found for _, found, _ in rows) and any("saved" in found for _, found, _ in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_passes(capsys):
    assert gpu_check.main([]) == 2
    assert "no CUDA device: nothing was checked" in capsys.readouterr().err


class Answers(Check):
    """Processes that are not started: what each would have said."""

    def __init__(self, scratch: Path, *answers: tuple[int, str]) -> None:
        super().__init__(scratch, is_rehearsal=False, minutes=1)
        self.answers = list(answers)

    def run(self, command, device=None, limit=600):
        return self.answers.pop(0) if self.answers else (124, "out of time")


def _line(iteration: int, loss: str, gib: str = "10.00") -> str:
    return (
        f"[10:00:00] iteration {iteration:>3}/100 | samples 8 | loss {loss} | lr 1e-4 | grad norm 1 | 90,000 tokens/s "
        f"| 70 TFLOP/s | MFU 22.0% | {gib} GiB | ETA 0:01\n"
    )


ESTIMATE = "stage 0    1,300,000  2.00  2.00  3.00  3.00  1.00  10.00\n"
FINE = _line(25, "10.8") + _line(100, "9.1")


def _verdicts(rows) -> list[str]:
    return [row.verdict for row in rows]


def test_training_that_ends_early_or_explodes_or_takes_more_memory_is_seen(tmp_path):
    six = [(0, FINE)] * 6
    shapes = (*six, (0, ESTIMATE), (0, FINE), *six[:3], (0, ESTIMATE), (0, FINE))
    assert set(_verdicts(gpu_check.training(Answers(tmp_path, *shapes)))) == {OK}
    early, exploded = _line(25, "10.8"), _line(25, "10.8") + _line(100, "14.2")
    wrong = (0, early), (0, exploded), (1, "CUDA error: out of memory"), *six[:3]
    much = (0, ESTIMATE), (0, _line(4, "10.8", "13.00"))
    verdicts = _verdicts(gpu_check.training(Answers(tmp_path, *wrong, *much)))
    assert verdicts[:7] == [FAILED, FAILED, FAILED, OK, OK, OK, FAILED]
    assert set(verdicts[7:]) == {NOT_RUN}


def test_tests_kernels_and_saves_that_fail_are_seen(tmp_path):
    assert _verdicts(gpu_check.tests(Answers(tmp_path, (0, "== 134 passed in 9 s ==")))) == [OK]
    assert _verdicts(gpu_check.tests(Answers(tmp_path, (1, "== 1 failed, 133 passed in 9 s ==")))) == [FAILED]
    assert _verdicts(gpu_check.tests(Answers(tmp_path, (0, "== 134 skipped in 1 s ==")))) == [FAILED]
    table = "layer_norm          1.000     0.500    2.00    3000\n"
    assert _verdicts(gpu_check.kernels(Answers(tmp_path, (0, table), (0, table)))) == [OK, OK]
    assert _verdicts(gpu_check.kernels(Answers(tmp_path, (0, ""), (1, table)))) == [FAILED, OK, FAILED]
    twice = "[1] saved /x: 1 MiB\n[1] saved /x: 1 MiB\n"
    assert _verdicts(gpu_check.save(Answers(tmp_path, (0, twice)))) == [OK]
    assert _verdicts(gpu_check.save(Answers(tmp_path, (0, "[1] saved /x: 1 MiB\n")))) == [FAILED]


def test_a_resume_without_its_proof_is_seen(tmp_path):
    folder = tmp_path / "source" / "global_step3"
    folder.mkdir(parents=True)
    (folder / "ucp.json").write_text('{"parameters": {}}')
    proof = "state digest abcdef0123 equals the one at save (direct resume)\n"
    fine, silent = (0, proof + _line(6, "6.2")), (0, _line(6, "6.2"))
    rows = list(gpu_check.journey(Answers(tmp_path, (0, ""), fine, silent, (1, proof))))
    assert _verdicts(rows) == [OK, OK, FAILED, FAILED]
    assert _verdicts(gpu_check.journey(Answers(tmp_path, (1, "RankFailure")))) == [FAILED]


def test_one_failure_is_the_whole_commands(monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.SECTIONS, "tests", lambda check: iter([Row("a", "b", OK), Row("c", "d", FAILED)]))
    assert gpu_check.main(["--rehearsal", "--only", "tests"]) == 1
    assert "2 checks, 1 failed" in capsys.readouterr().out
