"""The example scripts, without training: DRY_RUN=1 prints what would run, and that must be right.

Each training command is read back by the project's own command line; paths that one step writes must be those
the next one reads.
"""

import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron.config.arguments import parse
from megatron.elastic.agent import AgentOptions, training_flags
from megatron.elastic.policy import fit
from tb_analysis.curves import Curve, Point

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

# example: (Source, Target) as (tp, pp, dp)
DEGREES = {
    "ex1": ((1, 2, 1), (1, 1, 1)),
    "ex2": ((2, 1, 1), (1, 1, 1)),
    "ex3": ((1, 1, 2), (1, 1, 1)),
    "ex4": ((2, 1, 1), (1, 2, 1)),
}
STEPS = ("init_train_source.sh", "convert.sh", "resume_train_target.sh", "run.sh")

# The paper's Figure 7a, as printed there: (tp, pp, dp, sp, ZeRO)
FIGURE_7_SOURCE = (2, 2, 2, 1, 1)
FIGURE_7_TARGETS = {
    (1, 1, 1, 1, 1),
    (1, 1, 2, 1, 3),
    (1, 1, 2, 2, 1),
    (1, 1, 4, 1, 2),
    (1, 1, 4, 1, 3),
    (1, 2, 2, 1, 1),
    (2, 1, 1, 1, 1),
    (2, 1, 2, 1, 1),
    (2, 1, 2, 1, 2),
    (2, 2, 1, 1, 1),
    (2, 2, 2, 1, 1),
}

# The paper's Figure 9, its BLOOM scaled down. Of each model: (tp, pp, dp, ep) of the Source and of its Targets.
FIGURE_9 = {
    "llama": ((2, 2, 2, 1), ((2, 1, 2, 1), (2, 2, 1, 1))),
    "bloom": ((2, 2, 2, 1), ((2, 2, 1, 1),)),
    "moe": ((1, 2, 4, 4), ((2, 2, 2, 2),)),
}
SIZES = {"tiny": ("fp32", 4, 64), "125M": ("fp16", 12, 768)}


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return next(Path(word).name for word in self.words if word.endswith(".py"))

    @property
    def flags(self) -> list[str]:
        at = next(i for i, word in enumerate(self.words) if word.endswith(".py"))
        return list(self.words[at + 1 :])

    def value(self, flag: str) -> str:
        return self.words[self.words.index(flag) + 1]


def bash(script: Path, run_dir: Path, **knobs: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG")}
    # DEVICE given: finding it out starts Python and imports torch.
    knobs = {"DRY_RUN": "1", "DEVICE": "cpu", "RUN_DIR": str(run_dir), **knobs}
    return subprocess.run(["bash", str(script)], env={**clean, **knobs}, capture_output=True, text=True)


def commands(script: Path, run_dir: Path, **knobs: str) -> list[Command]:
    done = bash(script, run_dir, **knobs)
    assert done.returncode == 0, done.stderr
    return [Command(tuple(shlex.split(line))) for line in done.stdout.splitlines()]


def test_every_example_has_every_step():
    scripts = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/*.sh"))
    assert {f"{example}/{step}" for example in DEGREES for step in STEPS} <= set(scripts)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.sh")), ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_script_is_sound_bash(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    text = path.read_text()
    assert not re.search(r"^\s*eval\b", text, re.MULTILINE)
    if path.name in STEPS:
        assert os.access(path, os.X_OK) and text.startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in text
        assert all(f"# {word}:" in text for word in ("Shows", "Hardware", "Minutes", "You see"))


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("example", DEGREES)
def test_run_is_five_commands_that_fit_together(example, size, launcher, tmp_path):
    run_dir = tmp_path / "run"
    run = commands(EXAMPLES / example / "run.sh", run_dir, SIZE=size, LAUNCHER=launcher)
    programs = [command.program for command in run]
    assert programs == [
        "pretrain_gpt.py",
        "ds_to_universal.py",
        "pretrain_gpt.py",
        "pretrain_gpt.py",
        "tb_analysis_script.py",
    ]
    source, convert, target, control, judge = run
    assert not run_dir.exists(), "DRY_RUN wrote something"

    degrees = DEGREES[example]
    topologies = {"source": degrees[0], "target": degrees[1], "control": degrees[0]}
    for role, command in zip(topologies, (source, target, control)):
        tp, pp, dp = topologies[role]
        check_training(command, tp, pp, dp, launcher, size)
        assert command.value("--tensorboard-dir") == f"{run_dir}/tensorboard/{role}_tp{tp}_pp{pp}_dp{dp}_z1"

    tag = "global_step100"
    assert source.value("--save-interval") == target.value("--save-interval") == "100"
    assert convert.value("--input_folder") == f"{source.value('--save')}/{tag}"
    universal = Path(convert.value("--output_folder"))
    assert universal.name == f"{tag}_universal"
    assert target.value("--load") == str(universal.parent) and "--universal-checkpoint" in target.words
    assert control.value("--load") == source.value("--save") and control.value("--load-tag") == tag
    assert "--universal-checkpoint" not in control.words and "--save" not in control.words
    assert judge.value("--tb_dir") == f"{run_dir}/tensorboard"
    # The control changes the order of sums, and nothing else.
    assert control.value("--micro-batch-size") != source.value("--micro-batch-size")
    assert target.value("--micro-batch-size") == source.value("--micro-batch-size")


def check_training(command: Command, tp: int, pp: int, dp: int, launcher: str, size: str) -> None:
    world = tp * pp * dp
    assert Path(command.words[command.words.index("DS_ACCELERATOR=cpu") + 1]).name == launcher
    assert command.value({"deepspeed": "--num_gpus", "torchrun": "--nproc-per-node"}[launcher]) == str(world)
    config = parse(command.flags).config
    topology = config.parallel.topology(world)
    assert (topology.tp_size, topology.pp_size, topology.dp_size) == (tp, pp, dp)
    assert (config.optimizer.precision, config.model.num_layers, config.model.hidden_size) == SIZES[size]
    assert (config.run.global_batch_size, config.run.train_iters) == (4, 200)
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.lr_decay_style) == (2e-3, 2e-4, "cosine")
    assert (config.model.hidden_dropout, config.model.attention_dropout) == (0.0, 0.0)
    assert config.parallel.zero_stage == 1


@pytest.mark.parametrize("example", DEGREES)
def test_source_command_passes_every_check_of_the_configuration(example, tmp_path):
    """Not only parsed: sizes divide, files of the data and tokenizer are there."""
    tp, pp, dp = DEGREES[example][0]
    (command,) = commands(EXAMPLES / example / "init_train_source.sh", tmp_path / "run", SIZE="tiny")
    parse(command.flags).config.validate(tp * pp * dp)


@pytest.mark.parametrize("example", DEGREES)
def test_run_is_the_three_steps(example, tmp_path):
    run = commands(EXAMPLES / example / "run.sh", tmp_path, SIZE="tiny")
    steps = [commands(EXAMPLES / example / step, tmp_path, SIZE="tiny") for step in STEPS[:3]]
    assert run[:3] == [command for step in steps for command in step]


def test_example_4_uses_the_source_of_example_2_and_writes_nothing_there(tmp_path):
    ex2, ex4 = tmp_path / "ex 2", tmp_path / "ex4"
    (ex2 / "checkpoints/source/global_step100").mkdir(parents=True)
    for folder in ("source_tp2_pp1_dp1", "control_tp2_pp1_dp1", "target_tp1_pp1_dp1"):
        (ex2 / "tensorboard" / folder).mkdir(parents=True)
    knobs = {"SIZE": "tiny", "SOURCE_RUN_DIR": str(ex2)}
    done = bash(EXAMPLES / "ex4" / "init_train_source.sh", ex4, **{**knobs, "DRY_RUN": "0"})
    assert done.returncode == 0, done.stderr
    copied = sorted(path.name for path in (ex4 / "tensorboard").iterdir())
    assert copied == ["control_tp2_pp1_dp1", "source_tp2_pp1_dp1"]
    (convert,) = commands(EXAMPLES / "ex4" / "convert.sh", ex4, **knobs)
    assert convert.value("--input_folder") == f"{ex2}/checkpoints/source/global_step100"
    assert convert.value("--output_folder").startswith(f"{ex4}/")
    run = commands(EXAMPLES / "ex4" / "run.sh", ex4, **knobs)
    programs = [command.program for command in run if any(word.endswith(".py") for word in command.words)]
    assert programs == ["ds_to_universal.py", "pretrain_gpt.py", "tb_analysis_script.py"]


@pytest.mark.parametrize(("seed", "is_used"), [("1234", True), ("7", False)], ids=["same-settings", "other-seed"])
def test_example_4_finds_example_2_beside_it_only_with_the_same_settings(seed, is_used, tmp_path):
    ex2, ex4 = tmp_path / "ex2", tmp_path / "ex4"
    (ex2 / "checkpoints/source/global_step100").mkdir(parents=True)
    shell = f"source {EXAMPLES}/ex2/topology.sh; source {EXAMPLES}/common.sh; settings"
    settings = {"PATH": os.environ["PATH"], "DEVICE": "cpu", "SIZE": "tiny"}
    printed = subprocess.run(["bash", "-c", shell], env=settings, capture_output=True, text=True, check=True)
    (ex2 / "settings.txt").write_text(printed.stdout)
    (convert,) = commands(EXAMPLES / "ex4" / "convert.sh", ex4, SIZE="tiny", SEED=seed)
    owner = ex2 if is_used else ex4
    assert convert.value("--input_folder") == f"{owner}/checkpoints/source/global_step100"


def cell(command: Command) -> tuple[int, ...]:
    """(tp, pp, dp, sp, ZeRO) of a training command, which must pass every check of the configuration."""
    world = int(command.value("--nproc-per-node"))
    config = parse(command.flags).config
    config.validate(world)
    topology = config.parallel.topology(world)
    degrees = (topology.tp_size, topology.pp_size, topology.dp_size, topology.sp_size)
    return (*degrees, config.parallel.zero_stage)


def run_name(command: Command) -> str:
    return Path(command.value("--tensorboard-dir")).name


def without_micro_batch_and_paths(command: Command) -> tuple:
    """What a control must share with its Source."""
    config = parse(command.flags).config
    run = dataclasses.replace(config.run, micro_batch_size=None, tensorboard_dir=None)
    return (config.model, config.parallel, config.optimizer, config.data, run)


def test_figure_7a_is_one_source_and_the_papers_eleven_targets(tmp_path):
    run = commands(EXAMPLES / "fig7" / "run.sh", tmp_path / "run", FIG="7a")
    assert not (tmp_path / "run").exists(), "DRY_RUN wrote something"
    source, direct, universal = one_source_and_its_targets(run)
    assert cell(source) == FIGURE_7_SOURCE
    assert len(direct) == 11 and {cell(t) for t in direct} == FIGURE_7_TARGETS
    assert len(universal) == 3 and {cell(t) for t in universal} < FIGURE_7_TARGETS


@pytest.mark.parametrize("model", FIGURE_9)
def test_figure_9_is_three_models_and_the_papers_pairs(model, tmp_path):
    run = commands(EXAMPLES / "fig9" / "run.sh", tmp_path / "run", FIG=model)
    assert not (tmp_path / "run").exists(), "DRY_RUN wrote something"
    source, direct, universal = one_source_and_its_targets(run)
    source_degrees, target_degrees = FIGURE_9[model]
    assert degrees_with_experts(source) == source_degrees
    assert tuple(map(degrees_with_experts, direct)) == target_degrees
    assert [degrees_with_experts(t) for t in universal] == [target_degrees[0]]
    assert {cell(c)[3:] for c in (source, *direct, *universal)} == {(1, 1)}, "no sequence parallelism, ZeRO-1"
    assert source.value("--model-preset") == f"tiny-{model}"
    model_config = parse(source.flags).config.model
    assert (model_config.num_experts, model_config.topk) == ((4,), 2) or model != "moe"
    assert f"fig9_{model}.png" in run[-1].value("--plot_name")


def degrees_with_experts(command: Command) -> tuple[int, ...]:
    return (*cell(command)[:3], parse(command.flags).config.parallel.moe_expert_parallel_size)


def one_source_and_its_targets(run: list[Command]) -> tuple[Command, list[Command], list[Command]]:
    """Source, direct and universal Targets of a figure, whose commands must fit together."""
    source, *targets, control, judge = [c for c in run if c.program != "ds_to_universal.py"]
    direct = [t for t in targets if "--universal-checkpoint" not in t.words]
    universal = [t for t in targets if "--universal-checkpoint" in t.words]
    assert cell(source) == cell(control)
    (convert,) = [c for c in run if c.program == "ds_to_universal.py"]
    saved = f"global_step{source.value('--save-interval')}"
    for command in (*direct, control):
        assert (command.value("--load"), command.value("--load-tag")) == (source.value("--save"), saved)
    for command in universal:
        assert command.value("--load") == str(Path(convert.value("--output_folder")).parent)
    assert convert.value("--input_folder") == f"{source.value('--save')}/{saved}"
    # None writes where another reads, and none is taken for another.
    assert len({run_name(c) for c in (source, *targets, control)}) == len(targets) + 2
    assert not any("--save" in c.words for c in (*targets, control))
    # All alike but for the topology; the control differs in its micro batch alone.
    assert {without_micro_batch_and_paths(c)[0] for c in targets} == {without_micro_batch_and_paths(source)[0]}
    assert {c.value("--micro-batch-size") for c in (source, *targets)} == {"2"}
    assert control.value("--micro-batch-size") == "1"
    assert without_micro_batch_and_paths(control) == without_micro_batch_and_paths(source)
    check_figure_is_judged(judge, [source])
    return source, direct, universal


def test_figure_7b_is_eight_sources_each_with_its_control_and_one_target(tmp_path):
    run = commands(EXAMPLES / "fig7" / "run.sh", tmp_path / "run", FIG="7b")
    *trainings, judge = run
    sources, targets, controls = trainings[::3], trainings[1::3], trainings[2::3]
    assert len(sources) == 8 and {cell(s) for s in sources} < FIGURE_7_TARGETS - {FIGURE_7_SOURCE}
    assert len({cell(s) for s in sources}) == 8
    for source, target, control in zip(sources, targets, controls, strict=True):
        saved = f"global_step{source.value('--save-interval')}"
        for command in (target, control):
            assert (command.value("--load"), command.value("--load-tag")) == (source.value("--save"), saved)
        assert cell(target) == FIGURE_7_SOURCE and cell(control) == cell(source)
        assert without_micro_batch_and_paths(control) == without_micro_batch_and_paths(source)
        folders = {Path(c.value("--tensorboard-dir")).parent for c in (source, target, control)}
        assert len(folders) == 1, "what belongs together lies in one folder"
    assert len({run_name(t) for t in targets}) == len({s.value("--save") for s in sources}) == 8
    check_figure_is_judged(judge, sources)


def check_figure_is_judged(judge: Command, sources: list[Command]) -> None:
    at = judge.words.index("--tb_dir")
    folders = judge.words[at + 1 : judge.words.index("--log_dir")]
    assert list(folders) == [str(Path(s.value("--tensorboard-dir")).parent) for s in sources]
    assert judge.value("--log_dir") == "../logs" and judge.value("--grad_norm_tolerance") == "1e-4"
    assert {"--plot_name", "--lanes", "--markdown", "--verdict_json"} <= set(judge.words)


@pytest.mark.parametrize(
    ("figure", "num_pictures", "known"), [("fig7", 2, "7a, 7b, both"), ("fig9", 3, "llama, bloom, moe, all")]
)
def test_figure_is_all_of_it_unless_asked_and_refuses_another(figure, num_pictures, known, tmp_path):
    run = commands(EXAMPLES / figure / "run.sh", tmp_path / "run")
    assert [c.program for c in run].count("tb_analysis_script.py") == num_pictures
    done = bash(EXAMPLES / figure / "run.sh", tmp_path / "run", FIG="8", DRY_RUN="0")
    assert done.returncode == 2 and f"none of {known}" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("figure", "failing", "code"),
    [("fig7", "fig7a", 1), ("fig7", "none", 0), ("fig9", "fig9_bloom", 1), ("fig9", "none", 0)],
    ids=["7a-fails", "7-pass", "bloom-fails", "9-pass"],
)
def test_figure_ends_with_the_verdict_of_each_of_its_parts(figure, failing, code, tmp_path):
    """With a stand-in for Python that writes what the analysis would, and says FAIL of one part."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    python, torchrun = bin_folder / "python", bin_folder / "torchrun"
    torchrun.write_text("#!/bin/sh\n")
    python.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 0 ]; do case "$1" in --markdown) md="$2";; --plot_name) png="$2";; esac; shift; done\n'
        '[ -z "$md" ] && exit 0\n'
        'echo table >"$md"; echo picture >"$png"\n'
        f'case "$md" in *{failing}.md) exit 1;; esac\n'
    )
    for stand_in in (python, torchrun):
        stand_in.chmod(0o755)
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    knobs = {"PYTHON": str(python), "LAUNCHER": "torchrun", "GALLERY_DIR": str(gallery), "DRY_RUN": "0"}
    done = bash(EXAMPLES / figure / "run.sh", tmp_path / "run", **knobs)
    assert done.returncode == code, done.stderr
    assert (f"FAIL: {failing}" in done.stderr) == (code == 1)
    # The others are made all the same.
    parts = {"fig7": {"fig7a": "7a", "fig7b": "7b"}, "fig9": {f"fig9_{model}": model for model in FIGURE_9}}[figure]
    made = sorted(p.name for p in gallery.iterdir())
    assert made == sorted(f"{name}.{kind}" for name in parts for kind in ("md", "png"))
    for name, fig in parts.items():
        assert f"FIG={fig} bash examples/{figure}/run.sh" in (gallery / f"{name}.md").read_text()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"SIZE": "huge"}, "neither tiny nor 125M"),
        ({"SIZE": "tiny", "PRECISION": "fp8"}, "none of fp32, bf16, fp16"),
        ({"SIZE": "tiny", "LAUNCHER": "mpirun"}, "neither deepspeed nor torchrun"),
        ({"SIZE": "tiny", "SOURCE_RUN_DIR": "/nowhere"}, "has no checkpoints/source/global_step100"),
    ],
    ids=lambda value: next(reversed(value.values())) if isinstance(value, dict) else "",
)
def test_wrong_knob_stops_before_anything_runs(knobs, message, tmp_path):
    done = bash(EXAMPLES / "ex4" / "init_train_source.sh", tmp_path / "run", **{"DRY_RUN": "0", **knobs})
    assert done.returncode == 2
    assert message in done.stderr and "error:" in done.stderr
    assert not (tmp_path / "run").exists()


def test_knobs_reach_the_command(tmp_path):
    knobs = {"SIZE": "tiny", "TARGET_TP": "2", "TARGET_DP": "2", "ZERO_STAGE": "2", "PRECISION": "bf16"}
    (command,) = commands(EXAMPLES / "ex1" / "resume_train_target.sh", tmp_path, **knobs, MICRO_BATCH="1")
    config = parse(command.flags).config
    assert str(config.parallel.topology(4)) == "tp2 pp1 dp2"
    assert (config.parallel.zero_stage, config.optimizer.precision) == (2, "bf16")
    assert config.run.micro_batch_size == 1
    assert command.value("--num_gpus") == "4"


def test_a_preset_with_experts_reaches_the_commands(tmp_path):
    knobs = {"SIZE": "tiny", "MODEL_PRESET": "tiny-moe", "SOURCE_DP": "2", "SOURCE_EP": "2", "LAUNCHER": "torchrun"}
    source, _, target, control, _ = commands(EXAMPLES / "ex2" / "run.sh", tmp_path, **knobs)
    assert degrees_with_experts(source) == degrees_with_experts(control) == (2, 1, 2, 2)
    assert degrees_with_experts(target) == (1, 1, 1, 1)
    assert {run_name(c) for c in (source, target)} == {"source_tp2_pp1_dp2_ep2_z1", "target_tp1_pp1_dp1_z1"}
    assert {parse(c.flags).config.model.num_experts for c in (source, target)} == {(4,)}


def test_readme_lists_every_example_and_only_knobs_that_exist():
    text = (EXAMPLES / "README.md").read_text()
    scripts = "".join(path.read_text() for path in EXAMPLES.rglob("*.sh"))
    assert all(f"| `{example}` |" in text for example in (*DEGREES, "fig7", "fig9"))
    table = text[text.index("| knob |") :]
    knobs = {
        word for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for word in re.findall("[A-Z_]{2,}", cell)
    }
    assert len(knobs) > 20
    assert sorted(knob for knob in knobs if not re.search(rf"\$\{{{knob}:[=-]", scripts)) == []


def test_hf_trainer_is_not_compared_with_a_copy_of_itself(tmp_path):
    """A run that found a checkpoint of the last step, because the kill missed the ranks, has nothing to train."""
    spec = importlib.util.spec_from_file_location("compare", EXAMPLES / "hf_trainer" / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    for name in compare.RUNS:
        (tmp_path / f"{name}.log").write_text("{'loss': '9.1'}\n" * (compare.LAST - compare.SAVED_AT))
    assert compare.faults(tmp_path) == []
    (tmp_path / "resumed_3.log").write_text("{'loss': '9.1'}\n")
    assert compare.faults(tmp_path) == ["resumed_3 trained 1 steps, not 40"]


def test_the_elastic_example_starts_agents_that_are_one_job(tmp_path):
    done = bash(EXAMPLES / "elastic/run.sh", tmp_path / "run")
    assert done.returncode == 0 and not (tmp_path / "run").exists(), done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    agents = [line for line in lines if "agent" in line]
    assert len(agents) == 5 and agents[3] == agents[4], "four, and the last once more"
    flags = agents[0][agents[0].index("--") + 1 :]
    job = training_flags(flags, AgentOptions(("127.0.0.1", 29400), "elastic", 1, 4))
    config = parse(job).config
    for ranks, topology in ((4, "tp2 pp1 dp2"), (3, "tp1 pp1 dp3")):
        fitted = fit(config, ranks)
        assert (fitted.num_ranks, str(fitted.config.parallel.topology(ranks))) == (ranks, topology)


LOG = """elastic: {ranks} rank(s) as tp1 pp1 dp{ranks}; batch 12 = ...
[10:0{at}:00] resuming directly from native checkpoint global_step{start} (iteration {start}, saved as x): why
[10:0{at}:01] iteration {first:3}/30 | samples
[10:0{at}:02] stopping at iteration {last}: SIGTERM
"""
STRETCHES = [(4, 0, 12), (3, 10, 20), (4, 20, 30)]
FAULTS = {
    "nothing": ({}, STRETCHES, None),
    "a loss is another": ({17: 1e-3}, STRETCHES, "is above the bound"),
    "an iteration is missing": ({17: None}, STRETCHES, "1 iterations are missing, the first 17"),
    "the job never shrank": ({}, [(4, 0, 30)], r"ran on \[4\] ranks"),
    "growing lost iterations": ({}, [(4, 0, 12), (3, 10, 20), (4, 18, 30)], "growing lost 2 iterations"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_elastic_verdict_sees_planted_faults(fault, tmp_path, monkeypatch, capsys):
    changes, stretches, told = FAULTS[fault]
    spec = importlib.util.spec_from_file_location("elastic_compare", EXAMPLES / "elastic/compare.py")
    compare = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "elastic_compare", compare)
    spec.loader.exec_module(compare)
    whole = {step: 10.0 - 0.1 * step for step in range(1, 31)}
    changed = {step: value + (changes.get(step, 0.0) or 0.0) for step, value in whole.items()}
    ours = {step: value for step, value in changed.items() if changes.get(step, 0.0) is not None}

    def read_curve(folder: Path, key: str) -> Curve:
        values = ours if folder.name == "target_elastic" else whole
        return Curve.from_points(Point(step, 0.0, value) for step, value in values.items())

    monkeypatch.setattr(compare, "read_curve", read_curve)
    for name in ("source_x", "control_x", "target_elastic"):
        (tmp_path / "tensorboard" / name).mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    for at, (ranks, start, last) in enumerate(stretches):
        text = LOG.format(ranks=ranks, at=at, start=start, first=start + 1, last=last)
        (tmp_path / f"logs/agent_{at}.log").write_text(text)
    assert compare.main(tmp_path) == (1 if told else 0)
    assert re.search(told or "PASS", capsys.readouterr().out)


SMOLLM2 = {
    "nothing": ({}, True, []),
    "a loss is another": ({7: 1e-3}, True, ["iteration 7 is 1.0e-03 away"]),
    "a loss is missing": ({3: None}, True, ["no loss of iteration 3"]),
    "a loss is no number": ({3: float("nan")}, True, ["iteration 3 is nan away"]),
    "the state was not proven": ({}, False, []),
}


@pytest.mark.parametrize("fault", SMOLLM2)
def test_the_verdict_on_smollm2_sees_planted_faults(fault):
    changes, has_proof, told = SMOLLM2[fault]
    spec = importlib.util.spec_from_file_location("smollm2_compare", EXAMPLES / "finetune_smollm2/compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    whole = {step: 3.5 - 0.01 * step for step in range(1, 25)}
    lines = [f"[10:00:00] iteration {step:2}/24 | samples 4 | loss {loss:.6f} | lr 1" for step, loss in whole.items()]
    proof = f"state digest {'0a' * 16} equals the one at save (direct resume)" if has_proof else "loaded"
    log = "\n".join([*lines, proof])
    assert compare.losses(log) == pytest.approx(whole) and compare.is_proven(log) is has_proof
    halves = {step: loss + (changes.get(step, 0.0) or 0.0) for step, loss in whole.items()}
    halves = {step: loss for step, loss in halves.items() if changes.get(step, 0.0) is not None}
    assert compare.faults(halves, whole, 12, 24) == told
    assert compare.faults(whole, whole, 24, 24) == ["one of the halves is empty"]
