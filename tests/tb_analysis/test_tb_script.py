"""The script as a user calls it: exit codes, table, CSV, JSON, picture, on real event files."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from tb_analysis.tb_analysis_script import main

SCRIPT = Path(__file__).resolve().parents[2] / "tb_analysis" / "tb_analysis_script.py"

KEY = "lm-loss-training/lm loss"
SAVED = 100
LAST = 200


def source_losses() -> dict[int, float]:
    rng = np.random.default_rng(1234)
    steps = np.arange(1, LAST + 1)
    losses = 6.0 + 4.8 * np.exp(-steps / 45) + rng.normal(0, 0.1, LAST)
    return dict(zip(steps.tolist(), np.float32(losses).astype(np.float64).tolist()))


def resumed_losses(noise: float = 2e-7, seed: int = 1) -> dict[int, float]:
    """Steps 101-200 of the Source, with a difference that grows as float rounding does."""
    rng = np.random.default_rng(seed)
    source = source_losses()
    steps = range(SAVED + 1, LAST + 1)
    growth = np.arange(1, LAST - SAVED + 1) * noise
    growth = growth * rng.choice([-1.0, 1.0], len(steps)) * rng.uniform(0.4, 1.0, len(steps))
    return {step: source[step] + extra for step, extra in zip(steps, growth.tolist())}


def write_run(folder: Path, losses: dict[int, float], key: str = KEY, **facts) -> Path:
    """Another event file in ``folder``; with facts also run.json."""
    with SummaryWriter(str(folder)) as writer:
        for step, loss in losses.items():
            writer.add_scalar(key, loss, step)
            writer.add_scalar("learning-rate/learning-rate", 1e-3, step)
    if facts:
        (folder / "run.json").write_text(json.dumps(facts))
    return folder


def write_source(root: Path, **facts) -> Path:
    return write_run(root / "source_tp1_pp2_dp1", source_losses(), **facts)


def write_target(root: Path, losses: dict[int, float], **facts) -> Path:
    return write_run(root / "target_tp1_pp1_dp1", losses, **facts)


def write_control(root: Path, noise: float = 2e-7) -> Path:
    return write_run(root / "control_tp1_pp2_dp1", resumed_losses(noise, seed=7))


def analyse(root: Path, *flags: str) -> int:
    return main(["--tb_dir", str(root), "--skip_plot", "--skip_csv", *flags])


def without(losses: dict[int, float], *steps: int) -> dict[int, float]:
    return {step: loss for step, loss in losses.items() if step not in steps}


def replaced(losses: dict[int, float], step: int, value: float) -> dict[int, float]:
    return {**losses, step: value}


JOINED = {
    "equal-to-the-bit": resumed_losses(noise=0.0),
    "float-order": resumed_losses(),
    "longer-than-the-source": {**resumed_losses(), 201: 6.1, 202: 6.0},
}

RESUMED = resumed_losses()
FAULTS = {
    "offset-1e-3": ({s: v + 1e-3 for s, v in RESUMED.items()}, {"first-step", "too-far"}),
    "one-late": ({s + 1: v for s, v in RESUMED.items()}, {"first-step", "too-far", "shifted"}),
    "one-early": ({s - 1: v for s, v in RESUMED.items()}, {"first-step", "too-far", "shifted", "missing-steps"}),
    "nan": (replaced(RESUMED, 150, float("nan")), {"not-finite", "too-far"}),
    "infinite": (replaced(RESUMED, 150, float("inf")), {"not-finite", "too-far"}),
    "hole": (without(RESUMED, 140, 141), {"missing-steps"}),
    "ended-early": (without(RESUMED, *range(190, 201)), {"missing-steps"}),
    "from-scratch": ({s: v + 0.5 for s, v in source_losses().items()}, {"started-again", "first-step", "too-far"}),
    "from-scratch-same-losses": (source_losses(), {"started-again"}),
    "no-overlap": ({s + 100: v for s, v in RESUMED.items()}, {"no-overlap"}),
    "drifts-away": (resumed_losses(noise=8e-6), {"too-far"}),
    "one-spike": (replaced(RESUMED, 170, RESUMED[170] + 1e-2), {"too-far"}),
}


@pytest.mark.parametrize("with_control", [False, True], ids=["alone", "control"])
@pytest.mark.parametrize("losses", JOINED.values(), ids=JOINED.keys())
def test_joined_curves_pass(tmp_path, losses, with_control, capsys):
    write_source(tmp_path)
    write_target(tmp_path, losses)
    if with_control:
        write_control(tmp_path)
    assert analyse(tmp_path) == 0
    out = capsys.readouterr().out
    assert "PASS: 1 Target" in out
    rule = "2 x the control's max |delta|" if with_control else "default for fp32, no control run"
    assert rule in out


@pytest.mark.parametrize("with_control", [False, True], ids=["alone", "control"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_fails_by_name(tmp_path, fault, with_control):
    losses, names = fault
    write_source(tmp_path)
    write_target(tmp_path, losses)
    if with_control:
        write_control(tmp_path)
    verdict = tmp_path / "verdict.json"
    assert analyse(tmp_path, "--verdict_json", str(verdict)) == 1
    facts = json.loads(verdict.read_text())
    assert facts["verdict"] == "FAIL"
    assert {failure["name"] for failure in facts["targets"][0]["failures"]} == names


def test_one_bad_target_among_good_ones_fails(tmp_path, capsys):
    write_source(tmp_path)
    write_target(tmp_path, RESUMED)
    write_run(tmp_path / "target_tp2_pp1_dp1", FAULTS["offset-1e-3"][0])
    assert analyse(tmp_path) == 1
    assert "FAIL: 1 of 2 Targets" in capsys.readouterr().out


def test_tolerance_flag_is_the_bound(tmp_path):
    write_source(tmp_path)
    write_target(tmp_path, FAULTS["offset-1e-3"][0])
    assert analyse(tmp_path, "--tolerance", "2e-3", "--first_tolerance", "2e-3") == 0
    assert analyse(tmp_path, "--tolerance", "9e-4", "--first_tolerance", "2e-3") == 1


def test_run_json_says_what_the_folder_name_does_not(tmp_path, capsys):
    facts = {"zero_stage": 1, "precision": "fp32", "commit": None}
    source = write_run(tmp_path / "a", source_losses(), topology="tp1 pp2 dp1", resumed_from=None, **facts)
    resumed_from = {"folder": "somewhere", "iteration": 100}
    write_run(tmp_path / "b", RESUMED, topology="tp1 pp1 dp1", resumed_from=resumed_from, **facts)
    write_run(tmp_path / "c", RESUMED, role="control", topology="tp1 pp2 dp1", resumed_from=resumed_from, **facts)
    assert analyse(tmp_path) == 0
    lines = [line.split()[:5] for line in capsys.readouterr().out.splitlines()]
    assert ["Source", "a", "tp1", "pp2", "dp1"] in lines
    assert ["Target", "b", "tp1", "pp1", "dp1"] in lines
    assert ["Control", "c", "tp1", "pp2", "dp1"] in lines
    # The iteration it was resumed from decides: losses from step 91 on were never those of a run saved at 100.
    write_run(tmp_path / "b", {s: source_losses()[s] for s in range(91, 101)})
    assert analyse(tmp_path) == 1
    (source / "run.json").write_text("{")
    assert analyse(tmp_path) == 2


def test_a_target_that_skips_its_first_steps_fails(tmp_path):
    write_source(tmp_path)
    write_target(tmp_path, without(RESUMED, 101, 102), resumed_from={"folder": "x", "iteration": 100})
    assert analyse(tmp_path) == 1


def test_restarted_run_counts_what_it_did_last(tmp_path):
    write_source(tmp_path)
    folder = write_target(tmp_path, {s: v + 1.0 for s, v in RESUMED.items() if s <= 150})
    assert analyse(tmp_path) == 1
    time.sleep(0.01)
    write_target(tmp_path, RESUMED)
    assert len(list(folder.glob("events.out.tfevents*"))) == 2
    assert analyse(tmp_path) == 0


def test_upstream_folder_names_need_nothing_else(tmp_path):
    write_run(tmp_path / "x" / "tp_2_pp_1_dp_1_sp_1_save", source_losses())
    write_run(tmp_path / "y" / "tp_1_pp_2_dp_1_sp_1", RESUMED)
    assert analyse(tmp_path) == 0


def test_csv_holds_the_curves_to_the_bit_and_plots_again(tmp_path, capsys):
    root, out = tmp_path / "tb", tmp_path / "csv"
    write_source(root)
    write_target(root, RESUMED)
    write_control(root)
    assert main(["--tb_dir", str(root), "--skip_plot", "--csv_name", f"{out}/"]) == 0
    first = capsys.readouterr().out
    names = ["control_tp1_pp2_dp1", "source_tp1_pp2_dp1", "target_tp1_pp1_dp1"]
    assert sorted(file.name for file in out.iterdir()) == [f"uc_out_{name}.csv" for name in names]
    with (out / "uc_out_target_tp1_pp1_dp1.csv").open() as file:
        rows = list(csv.DictReader(file))
    source = source_losses()
    assert [int(row["step"]) for row in rows] == list(range(101, 201))
    for row in rows:
        assert float(row["value"]) == pytest.approx(RESUMED[int(row["step"])], abs=5e-7)
        assert float(row["delta"]) == float(row["value"]) - source[int(row["step"])]
    # The CSV files alone give the same table.
    picture = tmp_path / "again.png"
    assert main(["--plot_only", "--csv_dir", str(out), "--plot_name", str(picture)]) == 0
    assert capsys.readouterr().out == first
    assert picture.stat().st_size > 20_000


def test_upstream_csv_with_index_column_is_read(tmp_path):
    for name, losses in (("source_tp_1", source_losses()), ("target_tp_2", RESUMED)):
        lines = [",step,value", *(f"{i},{s},{v}" for i, (s, v) in enumerate(losses.items()))]
        (tmp_path / f"uc_out_{name}.csv").write_text("\n".join(lines) + "\n")
    assert main(["--plot_only", "--csv_dir", str(tmp_path), "--skip_plot"]) == 0


def no_events(root: Path) -> list[str]:
    (root / "empty").mkdir()
    return ["--tb_dir", str(root / "empty")]


def no_folder(root: Path) -> list[str]:
    return ["--tb_dir", str(root / "nowhere")]


def unknown_key(root: Path) -> list[str]:
    write_source(root)
    return ["--tb_dir", str(root), "--tb_event_key", "lm loss"]


def only_a_source(root: Path) -> list[str]:
    write_source(root)
    return ["--tb_dir", str(root)]


def only_a_target(root: Path) -> list[str]:
    write_target(root, RESUMED)
    return ["--tb_dir", str(root)]


def two_sources(root: Path) -> list[str]:
    write_source(root)
    write_run(root / "source_tp2", source_losses())
    return ["--tb_dir", str(root)]


def bad_csv(root: Path) -> list[str]:
    (root / "table.csv").write_text("a,b\n1,2\n")
    return ["--plot_only", "--csv_dir", str(root)]


UNUSABLE = {
    no_events: "no event file",
    no_folder: "no such folder",
    unknown_key: "'lm-loss-training/lm loss'",
    only_a_source: "no Target",
    only_a_target: "no Source",
    two_sources: "source_tp1_pp2_dp1, source_tp2",
    bad_csv: "expected step and value",
}


@pytest.mark.parametrize("prepare", UNUSABLE, ids=lambda f: f.__name__)
def test_nothing_to_compare_is_exit_code_2_and_says_what_was_found(tmp_path, capsys, prepare):
    assert main([*prepare(tmp_path), "--skip_plot", "--skip_csv"]) == 2
    assert UNUSABLE[prepare] in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--tolerance", "-1"], ["--no_such_flag"], ["--analyzer", "other"]])
def test_wrong_usage_is_exit_code_2(flags):
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2


def test_chosen_source_settles_two_sources(tmp_path):
    two_sources(tmp_path)
    write_target(tmp_path, RESUMED)
    assert analyse(tmp_path) == 2
    assert analyse(tmp_path, "--source", "source_tp2") == 0


def test_as_a_file_from_another_folder(tmp_path):
    """As users call it: not as a module, and not from the repository's root."""
    write_source(tmp_path / "tb")
    write_target(tmp_path / "tb", FAULTS["one-late"][0])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tb_dir", "tb", "--plot_name", "X.png", "--plot_title", "T", "--use_sns"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "shifted by +1 step" in done.stdout
    assert (tmp_path / "X.png").is_file() and (tmp_path / "uc_out_source_tp1_pp2_dp1.csv").is_file()
