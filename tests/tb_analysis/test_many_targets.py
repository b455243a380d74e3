"""The proof of Figure 7 on made curves: many Targets, grad norms, state digests, several Sources; no training.

A sound set passes; then each way in which one Target can be wrong is planted in one of them, and must be named.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from tb_analysis.logs import read_digests
from tb_analysis.tb_analysis_script import main

ROOT = Path(__file__).resolve().parents[2]

SAVED, LAST = 30, 60
DIGEST, OTHER_DIGEST = "e8e507904dc9f13a9cdea2dce03c39af", "74e6d9cf51378a88598a0fa149051301"
TARGETS = ("tp1_pp1_dp1_z1", "tp1_pp1_dp2_z3", "tp1_pp1_dp2_sp2_z1")


def curves(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Losses and grad norms of steps 1..60. The seed decides which samples a step sees, not where the loss goes."""
    rng = np.random.default_rng(seed)
    steps = np.arange(1, LAST + 1)
    return 7 + 3.8 * np.exp(-steps / 20) + rng.normal(0, 0.1, LAST), 1 + rng.uniform(0, 0.2, LAST)


def write_run(root: Path, name: str, losses, norms, first: int = 1, log: str = "") -> None:
    """As a run leaves it: events under tensorboard/, its output under logs/."""
    with SummaryWriter(str(root / "tensorboard" / name)) as writer:
        for step, (loss, norm) in enumerate(zip(losses, norms), start=first):
            writer.add_scalar("lm-loss-training/lm loss", loss, step)
            if norm is not None:
                writer.add_scalar("grad-norm/grad-norm", norm, step)
    resumed_from = {"folder": "x", "iteration": SAVED, "kind": "direct"} if first > 1 else None
    (root / "tensorboard" / name / "run.json").write_text(json.dumps({"resumed_from": resumed_from}))
    (root / "logs").mkdir(exist_ok=True)
    (root / "logs" / f"{name}.log").write_text(log)


def saved_line(iteration: int, digest: str) -> str:
    folder = f"/runs/checkpoints/source/global_step{iteration}"
    return f"[20:27:34] saved {folder}: 89.6 MiB in 0.63 s (0.14 GiB/s), state digest {digest}\n"


def loaded_line(digest: str) -> str:
    return f"[20:28:13] state digest {digest} equals the one at save (direct resume)\n"


def write_target(root: Path, name: str, losses=None, norms=None, log: str | None = None) -> None:
    """Without arguments a sound one: rounding apart from the Source."""
    true_losses, true_norms = curves()
    rounding = 4e-7 * np.resize([1, -1, 0], LAST - SAVED)
    losses = true_losses[SAVED:] + rounding if losses is None else losses
    norms = true_norms[SAVED:] * (1 + rounding) if norms is None else norms
    write_run(root, name, losses, norms, SAVED + 1, loaded_line(DIGEST) if log is None else log)


def write_set(root: Path, source: str = "tp2_pp2_dp2_z1", targets=TARGETS) -> Path:
    log = saved_line(SAVED, DIGEST) + saved_line(LAST, OTHER_DIGEST)
    write_run(root, f"source_{source}", *curves(), log=log)
    write_target(root, f"control_{source}")
    for target in targets:
        write_target(root, f"target_{target}")
    return root


def analyse(*roots: Path, out: Path, flags: tuple[str, ...] = ()) -> tuple[int, dict]:
    folders = [str(root / "tensorboard") for root in roots]
    verdict = out / "verdict.json"
    asked = ["--grad_norm_tolerance", "1e-4", "--log_dir", "../logs", "--verdict_json", str(verdict)]
    code = main(["--tb_dir", *folders, "--skip_plot", "--skip_csv", *asked, *flags])
    return code, json.loads(verdict.read_text()) if verdict.is_file() else {}


def test_sound_targets_pass_with_their_numbers(tmp_path, capsys):
    page = tmp_path / "page.md"
    code, facts = analyse(write_set(tmp_path / "a"), out=tmp_path, flags=("--markdown", str(page)))
    assert (code, facts["verdict"], len(facts["targets"])) == (0, "PASS", 3)
    for target in facts["targets"]:
        assert target["digest_saved"] == target["digest_loaded"] == DIGEST
        assert 1e-7 < target["grad_norm_delta"] < 1e-6
    assert "PASS: 3 Targets" in capsys.readouterr().out
    rows = [line for line in page.read_text().splitlines() if line.endswith("| PASS |")]
    assert len(rows) == 3 and all(row.count(f"`{DIGEST[:12]}`") == 2 and "direct at 30" in row for row in rows)


FAULTS = {
    "another-seed": (lambda: dict(zip(("losses", "norms"), (c[SAVED:] for c in curves(seed=2)))), "first-step"),
    "data-one-step-on": (lambda: dict(zip(("losses", "norms"), (np.roll(c, -1)[SAVED:] for c in curves()))), "shifted"),
    "grad-norms-off-by-2e-4": (lambda: {"norms": curves()[1][SAVED:] * (1 + 2e-4)}, "grad-norm"),
    "one-grad-norm-nan": (lambda: {"norms": [*curves()[1][SAVED:-1], float("nan")]}, "grad-norm"),
    "other-state-loaded": (lambda: {"log": loaded_line(OTHER_DIGEST)}, "digest"),
    "nothing-proven-at-load": (lambda: {"log": "warning: the load could not be proven\n"}, "no-digest"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_one_wrong_target_among_sound_ones_fails_by_name(tmp_path, fault):
    make, name = fault
    root = write_set(tmp_path / "a")
    write_target(root, "target_tp2_pp1_dp1_z1", **make())
    page = tmp_path / "page.md"
    code, facts = analyse(root, out=tmp_path, flags=("--markdown", str(page)))
    assert (code, facts["verdict"]) == (1, "FAIL")
    failed = {target["run"]: [f["name"] for f in target["failures"]] for target in facts["targets"]}
    assert name in failed.pop("target_tp2_pp1_dp1_z1")
    assert not any(failed.values())
    assert page.read_text().count("| FAIL |") == 1


def test_digest_must_be_that_of_the_iteration_that_was_resumed(tmp_path):
    root = write_set(tmp_path / "a", targets=("tp1_pp1_dp1_z1",))
    (root / "logs" / "source_tp2_pp2_dp2_z1.log").write_text(saved_line(LAST, DIGEST))
    code, facts = analyse(root, out=tmp_path)
    assert (code, [f["name"] for f in facts["targets"][0]["failures"]]) == (1, ["no-digest"])


def test_missing_log_or_grad_norm_is_no_verdict(tmp_path, capsys):
    root = write_set(tmp_path / "a")
    (root / "logs" / "target_tp1_pp1_dp1_z1.log").unlink()
    assert analyse(root, out=tmp_path)[0] == 2
    assert "target_tp1_pp1_dp1_z1.log: no such log" in capsys.readouterr().err
    other = write_set(tmp_path / "b", targets=())
    write_target(other, "target_tp1_pp1_dp1_z1", norms=[None] * (LAST - SAVED))
    assert analyse(other, out=tmp_path)[0] == 2
    assert "no scalar 'grad-norm/grad-norm'" in capsys.readouterr().err


def test_what_was_not_asked_for_is_neither_read_nor_judged(tmp_path, capsys):
    root = write_set(tmp_path / "a")
    for log in (root / "logs").iterdir():
        log.unlink()
    assert main(["--tb_dir", str(root / "tensorboard"), "--skip_plot", "--skip_csv"]) == 0
    assert "digest" not in capsys.readouterr().out


def write_sources(root: Path) -> list[Path]:
    """Each Source in a folder of its own, with one Target whose name tells it."""
    names = ("tp1_pp1_dp1_z1", "tp1_pp2_dp2_z1")
    return [write_set(root / name, name, targets=(f"tp2_pp2_dp2_z1_from_{name}",)) for name in names]


def test_several_sources_are_judged_together(tmp_path, capsys):
    roots = write_sources(tmp_path)
    code, facts = analyse(*roots, out=tmp_path)
    assert (code, facts["verdict"], len(facts["groups"])) == (0, "PASS", 2)
    assert "PASS: 2 Targets of 2 Sources" in capsys.readouterr().out
    write_target(roots[1], "target_tp2_pp2_dp2_z1_from_tp1_pp2_dp2_z1", log=loaded_line(OTHER_DIGEST))
    code, facts = analyse(*roots, out=tmp_path)
    assert (code, [group["verdict"] for group in facts["groups"]]) == (1, ["PASS", "FAIL"])


def test_runs_of_one_name_do_not_overwrite_each_others_csv(tmp_path, capsys):
    roots = [write_set(tmp_path / name, name, targets=("tp2_pp2_dp2_z1",)) for name in ("tp1_pp1_dp1", "tp2_pp1_dp1")]
    folders = [str(root / "tensorboard") for root in roots]
    assert main(["--tb_dir", *folders, "--skip_plot", "--csv_name", f"{tmp_path}/csv/"]) == 2
    assert "two runs named target_tp2_pp2_dp2_z1" in capsys.readouterr().err
    assert not (tmp_path / "csv").exists()


def test_picture_of_several_sources_is_drawn(tmp_path):
    folders = [str(root / "tensorboard") for root in write_sources(tmp_path)]
    assert main(["--tb_dir", *folders, "--skip_csv", "--plot_name", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").stat().st_size > 20_000


def test_few_targets_have_lanes_if_asked(tmp_path, monkeypatch):
    """Which of the two pictures is drawn: Targets that lie on one another, direct and universal, need lanes."""
    drawn = []
    for module in ("picture.draw", "lanes.draw_lanes"):
        monkeypatch.setattr(f"tb_analysis.{module}", lambda *_, module=module: drawn.append(module))
    monkeypatch.setattr("tb_analysis.picture.save", lambda *_: None)
    folder = write_set(tmp_path / "run") / "tensorboard"
    for flags in ((), ("--lanes",)):
        assert main(["--tb_dir", str(folder), "--skip_csv", *flags]) == 0
    assert drawn == ["picture.draw", "lanes.draw_lanes"]


def test_the_last_save_and_load_of_a_log_count(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("".join(saved_line(30, digest) + loaded_line(digest) for digest in (OTHER_DIGEST, DIGEST)))
    digests = read_digests(log)
    assert (digests.saved, digests.loaded) == ({30: DIGEST}, DIGEST)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("saving.py", '"saved %s: %.1f MiB in %.2f s (%.2f GiB/s), state digest %s"'),
        ("proof.py", '"state digest %s equals the one at save (%s resume)"'),
    ],
)
def test_the_trainer_still_says_what_is_looked_for(file, words):
    """Reworded there, tb_analysis/logs.py must follow."""
    assert words in (ROOT / "megatron/checkpoint" / file).read_text()
