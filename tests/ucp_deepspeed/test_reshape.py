"""`ucp convert --to zeroN --dp N`: programs that have nothing of ours load what another topology saved.

Three truths: the state of the saving engine, gathered from its live tensors; the run that never stopped; and the files
that stock DeepSpeed writes of that state under the Target's topology, tensor by tensor.
"""

from __future__ import annotations

import datetime
import functools
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ucp_deepspeed import accelerate_program, trainer_program
from ucp_deepspeed.plain_program import OPTIMIZERS, STEPS, TAG, differences, engine_of, resume, save, step
from ucp_deepspeed.seen import Seen

from harness.pt_files import save_again
from harness.ranks import run_ranks
from megatron.ucp import cli
from megatron.ucp.diff import diff
from megatron.ucp.errors import DigestMismatchError, OutputExistsError, UcpError, UnsupportedCheckpointError
from megatron.ucp.reshape import reshape
from megatron.ucp.targets.native_target import NativeTarget
from megatron.ucp.verify import verify

BF16 = {"bf16": {"enabled": True}}
SOURCES = [(0, 1), (0, 2), *((stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2, 3))]
TARGETS = [(stage, ranks) for stage in (0, 1, 2, 3) for ranks in (1, 2, 4)]


class Saved(NamedTuple):
    folder: Path
    seen: Seen


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[..., Saved]:
    """By stock DeepSpeed, but for ZeRO-0, whose files do not say by themselves which parameter is which."""

    @functools.cache
    def make(stage: int, ranks: int, is_bf16: bool = False) -> Saved:
        folder = tmp_path_factory.mktemp(f"zero{stage}dp{ranks}")
        seen = run_ranks(ranks, save, str(folder), stage, BF16 if is_bf16 else {}, stage == 0)
        return Saved(folder, seen[0])

    return make


def reshaped(made: Saved, target: tuple[int, int], out: Path) -> Path:
    folder = out / made.folder.name
    result = reshape(made.folder, folder, NativeTarget(*target))
    assert verify(folder).is_sound and result.digest == verify(made.folder).digest
    return folder


@pytest.mark.parametrize(
    "target, is_bf16",
    [(target, False) for target in TARGETS] + [(target, True) for target in TARGETS if target[0]],
    ids=lambda value: f"to-zero{value[0]}dp{value[1]}" if isinstance(value, tuple) else "bf16" if value else "fp32",
)
def test_stock_deepspeed_loads_every_stage_and_size(target: tuple[int, int], is_bf16: bool, saved, tmp_path):
    there = [saved(*source, is_bf16) for source in SOURCES if source[0] or not is_bf16]
    folders = [str(reshaped(made, target, tmp_path)) for made in there]
    for by_rank in run_ranks(target[1], resume, folders, target[0], BF16 if is_bf16 else {}, False):
        for made, found in zip(there, by_rank, strict=True):
            assert not differences(found, made.seen)
            # Topologies differ in the order of sums alone; bf16 rounds gradients as they are summed.
            assert found.losses == pytest.approx(made.seen.losses, abs=2e-2 if is_bf16 else 2e-6)


ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
SMALL = {"zero_optimization": {"sub_group_size": 100}}
ALIGNED = {"zero_optimization": {"parameter_alignment": True}, "width": 21}
FP32_SUMS = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}}
SETTINGS: dict[str, tuple[tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "round_robin_gradients, other ranks": ((2, 3), (2, 2), ROUND_ROBIN),
    "round_robin_gradients, to ZeRO-3": ((2, 3), (3, 2), ROUND_ROBIN),
    "round_robin_gradients, from ZeRO-3": ((3, 2), (1, 3), ROUND_ROBIN),
    "small sub-groups, other ranks": ((3, 2), (3, 3), SMALL),
    "small sub-groups, to ZeRO-2": ((3, 3), (2, 2), SMALL),
    "small sub-groups, from ZeRO-1": ((1, 2), (3, 1), SMALL),
    "parameter_alignment": ((2, 3), (1, 2), ALIGNED),
    "parameter_alignment, from ZeRO-3": ((3, 2), (2, 3), ALIGNED),
    "no gathered weights": ((3, 2), (3, 3), {"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    "fp32 sums of bf16": ((1, 2), (1, 3), FP32_SUMS),
    "fp32 sums of bf16, round robin": ((3, 2), (1, 3), FP32_SUMS | ROUND_ROBIN),
    "fp16": ((2, 2), (3, 3), FP16),
    "fp16, from ZeRO-3": ((3, 2), (1, 3), FP16),
    **{
        f"{name}, to ZeRO-{target[0]}": ((2, 2), target, {"named": name})
        for name in sorted(set(OPTIMIZERS) - {"AdamW", "Odd"})
        for target in ((1, 3), (3, 1))
    },
}
"""(Source, Target, what the configuration of both says beside the stage)."""


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_decide_where_elements_lie(case: str, tmp_path):
    source, target, more = SETTINGS[case]
    there = Saved(tmp_path / "run", run_ranks(source[1], save, str(tmp_path / "run"), source[0], more, False)[0])
    folder = reshaped(there, target, tmp_path / "out")
    for [found] in run_ranks(target[1], resume, [str(folder)], target[0], more, False):
        assert not differences(found, there.seen)
        assert found.losses == pytest.approx(there.seen.losses, abs=2e-6 if not {"bf16", "fp16"} & set(more) else 2e-2)


# -- the files themselves --------------------------------------------------------------------------------------------


def _load_and_save(rank: int, world_size: int, folder: str, out: str, stage: int, more: dict) -> None:
    engine = engine_of(stage, world_size, 7, more, False)
    step(engine, 50, rank, world_size)
    engine.load_checkpoint(folder)
    engine.save_checkpoint(out, tag=TAG, client_state={"epoch": 4, "note": ["a", 1.5]})


def unlike(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Where two contents of .pt files differ in more than the order of keys or the class of a mapping."""
    if torch.is_tensor(ours) and torch.is_tensor(theirs):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
        return [] if same else [f"{place}: {ours} and {theirs}"]
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        lines = [f"{place}: {sorted(map(str, set(ours) ^ set(theirs)))}"] if set(ours) != set(theirs) else []
        return lines + [
            line for key in ours.keys() & theirs.keys() for line in unlike(ours[key], theirs[key], f"{place}/{key}")
        ]
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        return [line for i, pair in enumerate(zip(ours, theirs)) for line in unlike(*pair, f"{place}/{i}")]
    if type(ours).__module__.startswith("deepspeed.") and not isinstance(ours, int):
        return unlike(vars(ours), vars(theirs), place) if type(ours) is type(theirs) else [f"{place}: {ours}, {theirs}"]
    return [] if ours == theirs else [f"{place}: {ours} and {theirs}"]


FILES = [
    ((3, 2), (0, 2), {}), ((3, 2), (1, 3), {"width": 21}), ((1, 3), (2, 2), {"width": 21}),
    ((2, 2), (3, 3), {}), ((0, 2), (3, 2), {}),
    ((3, 3), (2, 2), BF16), ((2, 3), (3, 2), BF16), ((3, 2), (2, 3), ROUND_ROBIN),
    ((1, 2), (3, 3), SMALL),
    ((3, 2), (1, 3), ALIGNED),
]  # fmt: skip


@pytest.mark.parametrize("source, target, more", FILES, ids=str)
def test_the_files_are_those_that_stock_deepspeed_writes(source, target, more, tmp_path):
    there = run_ranks(source[1], save, str(tmp_path / "run"), source[0], more, source[0] == 0)[0]
    folder = reshaped(Saved(tmp_path / "run", there), target, tmp_path / "out") / TAG
    run_ranks(target[1], _load_and_save, str(folder.parent), str(tmp_path / "again"), target[0], more)
    names = {path.name for path in (tmp_path / "again" / TAG).iterdir()}
    assert names and {path.name for path in folder.iterdir()} == names | {"ucp.json"}
    for name in names:
        ours, theirs = (torch.load(where / name, weights_only=False) for where in (folder, tmp_path / "again" / TAG))
        for content in (ours, theirs):
            content.pop("ds_config", None)  # another program's: micro batch, stage
            inside = content.get("optimizer_state_dict", {})
            if source[0] in (0, 3):
                inside.pop("clip_grad", None)  # ZeRO-0 and 3 do not save it: the program's own is kept
            if more == ROUND_ROBIN:
                inside.pop("param_slice_mappings", None)  # DeepSpeed writes it of another order
        assert not unlike(ours, theirs), name


def test_planted_fault_in_a_file_is_seen_by_the_comparison(saved):
    file = saved(1, 2).folder / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    ours, theirs = torch.load(file, weights_only=False), torch.load(file, weights_only=False)
    assert not unlike(ours, theirs)
    ours["optimizer_state_dict"]["param_slice_mappings"][1]["norm.bias"].start += 1
    ours["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[3] += 1e-7
    ours["optimizer_state_dict"]["loss_scaler"].cur_scale = 2.0
    assert len(unlike(ours, theirs)) == 3


# -- Trainer and Accelerate ------------------------------------------------------------------------------------------


def _resume_trainer(rank: int, world_size: int, out: str, stage: int, checkpoint: str, more: dict):
    per_device = trainer_program.PER_DEVICE[world_size]
    accumulation = trainer_program.GLOBAL_BATCH // world_size // per_device
    return trainer_program.program(out, stage, per_device, accumulation, checkpoint, save_strategy="no", **more)


TRAINER = [((1, 2), (2, 3)), ((2, 4), (3, 1)), ((3, 3), (1, 4)), ((2, 1), (1, 2)), ((3, 2), (3, 3)), ((1, 3), (3, 2))]


@pytest.mark.parametrize("source, target", TRAINER, ids=str)
@pytest.mark.parametrize("is_lora", [False, True], ids=["whole", "LoRA"])
def test_stock_trainer_resumes(source: tuple[int, int], target: tuple[int, int], is_lora: bool, tmp_path):
    more = {"lora_on": 5} if is_lora else {}
    whole = run_ranks(source[1], trainer_program.save, str(tmp_path / "a"), source[0], more, False, timeout=300)
    there, here = tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3"
    assert reshape(there, here, NativeTarget(*target)).global_batch == trainer_program.GLOBAL_BATCH
    names = {path.name for path in there.iterdir() if not path.name.startswith("rng_state")}
    assert {path.name for path in here.iterdir() if not path.name.startswith("rng_state")} == names
    found = run_ranks(target[1], _resume_trainer, str(tmp_path / "c"), target[0], str(here), more, timeout=300)
    assert not trainer_program.differences(found, whole)


@pytest.mark.parametrize("source, target", [((1, 2), (2, 3)), ((2, 3), (3, 1)), ((3, 1), (1, 4)), ((3, 2), (3, 3))])
def test_stock_accelerate_resumes(source: tuple[int, int], target: tuple[int, int], tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    [before] = run_ranks(source[1], accelerate_program.program, str(there), source[0], [], False)[0]
    reshape(there, here, NativeTarget(*target))
    states = {f"random_states_{rank}.pkl" for rank in range(min(source[1], target[1]))}
    kept = {path.name for path in there.iterdir() if not path.name.startswith("random_states_")}
    assert {path.name for path in here.iterdir()} == kept | states
    for [found] in run_ranks(target[1], accelerate_program.program, "", target[0], [str(here)], False):
        assert not accelerate_program.differences(found, before)


# -- what is refused, and what is left as it was ---------------------------------------------------------------------


def test_a_changed_byte_is_found_and_nothing_is_written(tmp_path):
    """Of a checkpoint with digests."""
    run_ranks(2, save, str(tmp_path / "run"), 1, {}, True)
    path = tmp_path / "run" / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    moment = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"]
    raw = bytearray(path.read_bytes())
    raw[raw.index(moment.numpy().tobytes()) + 21] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DigestMismatchError, match=rf"\(exp_avg\).*1 file\(s\) changed .*{path.name}"):
        reshape(tmp_path / "run", tmp_path / "out", NativeTarget(2, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_output_is_of_the_form_of_the_input(saved, tmp_path):
    made, target = saved(1, 2), NativeTarget(2, 1)
    reshape(made.folder / TAG, tmp_path / "new" / "any_tag", target)
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"any_tag", "latest"}
    assert (tmp_path / "new" / "latest").read_text() == "any_tag"
    reshape(made.folder, tmp_path / "run", target)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {TAG, "latest", "zero_to_fp32.py", "zero_to_torch.py"}
    reshape(made.folder / TAG, made.folder / "for_one_rank", target)
    assert (made.folder / "latest").read_text() == TAG  # the run goes on from its own
    assert diff(made.folder / "for_one_rank", tmp_path / "run").is_equal
    for output in (tmp_path / "run", made.folder / "inside", made.folder / TAG / "inside"):
        with pytest.raises(OutputExistsError):
            reshape(made.folder, output, target)


def test_made_again_from_what_was_made(saved, tmp_path):
    made = saved(3, 2)
    reshape(made.folder, tmp_path / "a", NativeTarget(1, 3))
    reshape(tmp_path / "a", tmp_path / "b", NativeTarget(3, 2))
    first, again = made.folder / TAG, tmp_path / "b" / TAG
    for path in first.iterdir():
        ours, theirs = (torch.load(where / path.name, weights_only=False) for where in (again, first))
        assert not unlike(ours, theirs), path.name


def test_links_and_other_checkpoints_beside_are_left_out(tmp_path, caplog):
    run_ranks(2, accelerate_program.program, str(tmp_path / "a"), 1, [], False)
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (tmp_path / "a" / "notes").symlink_to(secret)
    (tmp_path / "a" / "more").mkdir()
    (tmp_path / "a" / "more" / "kept.json").write_text("{}")
    (tmp_path / "a" / "more" / "link").symlink_to(secret)
    shutil.copytree(tmp_path / "a" / "pytorch_model", tmp_path / "a" / "pytorch_model_1")
    reshape(tmp_path / "a", tmp_path / "b", NativeTarget(1, 1))
    assert not (tmp_path / "b" / "notes").exists() and (tmp_path / "b" / "more" / "kept.json").read_text() == "{}"
    assert not (tmp_path / "b" / "more" / "link").exists()
    assert "more/link, notes" in caplog.text
    assert "only pytorch_model is written anew, and left out are: pytorch_model_1" in caplog.text


def _save_of_each_rank(rank: int, world_size: int, folder: str) -> None:
    engine = engine_of(3, world_size, 0, {}, False)
    step(engine, 0, rank, world_size)
    engine.module.num_calls.fill_(10 + rank)
    engine.save_checkpoint(folder, client_state={"rank": rank})


def test_each_rank_of_zero3_goes_on_with_its_own(tmp_path):
    """Buffers and the program's state; ranks beyond those that saved take the first's."""
    run_ranks(2, _save_of_each_rank, str(tmp_path / "a"))
    folder = reshape(tmp_path / "a", tmp_path / "b", NativeTarget(3, 3)).output
    for rank, theirs in enumerate((0, 1, 0)):
        path = next(folder.glob(f"*/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"))
        content = torch.load(path, weights_only=False)
        assert content["rank"] == theirs and float(content["module"]["num_calls"]) == 10 + theirs


class Policy:
    """Of a program, and unknown to us."""

    def __init__(self, name: str):
        self.name, self.sizes = name, [1, 2]

    def __eq__(self, other) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)


class Slotted(NamedTuple):
    """Made anew by __new__ with its values."""

    first: int
    second: str


def _state_of_a_program() -> dict[str, Any]:
    rng = np.random.RandomState(3)
    return {
        "policy": Policy("greedy"),
        "pair": Slotted(1, "two"),
        "when": datetime.datetime(2026, 1, 2),
        "random": {
            "numpy": rng.get_state(),
            "python": random.Random(3).getstate(),
            "torch": torch.Generator().manual_seed(3).get_state(),
        },
        "table": np.arange(6, dtype=np.int16).reshape(2, 3),
        "class": Policy,
        "epoch": 3,
    }


def _save_more(rank: int, world_size: int, folder: str) -> None:
    engine = engine_of(3, world_size, 0, {}, False)
    step(engine, 0, rank, world_size)
    engine.save_checkpoint(folder, client_state=_state_of_a_program())


def _resume_with_it(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    engine = engine_of(2, world_size, 7, {}, False)
    state = engine.load_checkpoint(folder)[1]
    return {key: state[key] for key in _state_of_a_program() if key != "torch"}


def test_a_programs_own_objects_come_back_as_they_were(tmp_path, monkeypatch):
    """They were inert in between: nothing of theirs ran where the folder was made."""
    expected = _state_of_a_program()
    run_ranks(2, _save_more, str(tmp_path / "a"))
    with monkeypatch.context() as patched:
        patched.setattr(Policy, "__new__", None)  # whoever made one here would fail
        reshape(tmp_path / "a", tmp_path / "b", NativeTarget(2, 1))
    [found] = run_ranks(1, _resume_with_it, str(tmp_path / "b"))
    assert all(type(found[key]) is type(expected[key]) for key in expected)
    assert (found.pop("table") == expected.pop("table")).all()
    state, there = found.pop("random"), expected.pop("random")
    assert state["python"] == there["python"] and torch.equal(state["torch"], there["torch"])
    assert (state["numpy"][1] == there["numpy"][1]).all() and state["numpy"][2:] == there["numpy"][2:]
    assert found == expected


def _edited(folder: Path, name: str, edit: Callable[[dict], None]) -> None:
    content = torch.load(folder / TAG / name, weights_only=False)
    edit(content)
    save_again(content, folder / TAG / name)


def test_names_say_bf16_where_no_configuration_does(saved, tmp_path):
    """DeepSpeed looks for a bf16 engine's files by that name. The files that were read have it."""
    shutil.copytree(saved(2, 2, True).folder, tmp_path / "a")
    _edited(tmp_path / "a", "mp_rank_00_model_states.pt", lambda content: content.pop("ds_config"))
    folder = reshape(tmp_path / "a", tmp_path / "b", NativeTarget(1, 1)).output
    assert (folder / TAG / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").is_file()


def test_a_buffer_in_half_precision_is_no_weight_in_it(saved, tmp_path):
    shutil.copytree(saved(1, 2).folder, tmp_path / "a")
    half = torch.zeros(1, dtype=torch.bfloat16)
    _edited(tmp_path / "a", "mp_rank_00_model_states.pt", lambda content: content["module"].update(num_calls=half))
    assert verify(reshape(tmp_path / "a", tmp_path / "b", NativeTarget(0, 1)).output).is_sound


def _one_step_more(content: dict) -> None:
    content["optimizer"]["state"][1]["step"] += 1


def test_what_cannot_be_written_is_refused_with_all_reasons(saved, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UnsupportedCheckpointError, match="ZeRO-0 in half precision"):
        reshape(saved(1, 2, True).folder, out, NativeTarget(0, 1))
    run_ranks(2, save, str(tmp_path / "a"), 0, {}, True)
    (tmp_path / "a" / TAG / "ucp.json").unlink()
    names = ["inner.0.weight", "inner.1.weight", "inner.0.bias", "inner.1.bias", "norm.weight", "norm.bias"]
    _edited(tmp_path / "a", "mp_rank_00_model_states.pt", lambda content: content.update(ucp_parameter_names=names))
    _edited(tmp_path / "a", "mp_rank_00_model_states.pt", _one_step_more)
    with pytest.raises(UnsupportedCheckpointError, match=r"inner\.1\.weight is at {'step': 4.0}, inner\.0\.weight at"):
        reshape(tmp_path / "a", out, NativeTarget(2, 2))
    reshape(tmp_path / "a", out, NativeTarget(0, 1))  # which has a step for each parameter
    for stage, ranks in ((1, 0), (2, -1)):
        with pytest.raises(UcpError, match="parallel degree"):
            reshape(saved(1, 2).folder, tmp_path / "b", NativeTarget(stage, ranks))
    assert not (tmp_path / "b").exists()


def test_the_command_line(saved, tmp_path, capsys):
    made, out = saved(2, 3), tmp_path / "out"
    assert cli.main(["convert", str(made.folder), str(out), "--to", "zero3", "--dp", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["output"] == str(out) and data["digest"] == verify(out).digest
    for words in (["--to", "zero3"], ["--dp", "2"], ["--to", "zero4", "--dp", "2"], ["--to", "zero1", "--dp", "0"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["convert", str(made.folder), str(tmp_path / "no"), *words])
    assert "no number of ranks" in capsys.readouterr().err
    assert cli.main(["convert", str(made.folder), str(out), "--to", "zero3", "--dp", "2"]) == 1
    assert "already there" in capsys.readouterr().err


def test_steps_go_on_as_the_program_counts_them(saved, tmp_path):
    """Counters and schedule are in the files of each rank that reads them."""
    reshape(saved(1, 2).folder, tmp_path / "a", NativeTarget(3, 3))
    for rank in range(3):
        path = tmp_path / "a" / TAG / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        content = torch.load(path, weights_only=False)
        assert content["global_steps"] == STEPS and content["lr_scheduler"]["last_epoch"] == STEPS
        assert content["dp_world_size"] == 3 and content["ds_config"]["zero_optimization"]["stage"] == 3
