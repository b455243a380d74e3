"""Saves without the weights that are not trained: a run goes on from one and its base as from one that has them all."""

import shutil
from dataclasses import replace

import pytest
import torch
from ucp.huggingface_models import made, saved

from harness.ranks import RankFailure, run_ranks
from matrix.cells import cell
from matrix.recording import build, command_line, listen, train
from megatron.ucp import cli
from megatron.ucp.convert import convert
from megatron.ucp.errors import ManifestError, UnsupportedCheckpointError
from megatron.ucp.export import export, export_adapter, export_dcp
from megatron.ucp.manifest import LEFT_OUT, left_out, read_manifest, write_manifest
from megatron.ucp.naming.adapters import is_adapter
from megatron.ucp.sources import open_source
from megatron.ucp.verify import verify

ITERS, STOPS_AT = 4, 2
FROZEN = {
    "adapters": ("llama 3", {"lora_rank": 3, "lora_alpha": 6.0}),
    "adapters beside experts": ("qwen3_moe", {"lora_rank": 2}),
    "all but a few": ("gpt2", {"freeze_parameters": ("layers.0.*", "layers.1.*")}),
}
PAIRS = [
    ("adapters", "tp2pp1dp1-z1", "tp1pp1dp2-z3"),
    ("adapters", "tp1pp1dp2-z3", "tp3pp1dp1-z0"),
    ("adapters", "tp1pp3dp1-z1", "tp2pp1dp1-cut-z2"),
    ("adapters", "tp1pp1dp2-z2", "tp1pp1dp2-z2"),
    ("adapters beside experts", "tp1pp1dp2ep2-z1", "tp2pp1dp1-z1"),
    ("adapters beside experts", "tp1pp1dp4ep4-z3", "tp1pp1dp2ep2-z0"),
    ("all but a few", "tp2pp1dp1-z1", "tp1pp1dp2-z2"),
]


def argv_of(data, what, place, base, **flags):
    """No flag says what the model is. A base is needed by every run of them."""
    of_model = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    of_model += ("hidden_dropout", "attention_dropout")
    values = {**dict.fromkeys(of_model), "use_checkpoint_args": True, "pretrained_checkpoint": base, "iters": ITERS}
    values |= {"vocab_size": 100, "lr": 1e-2, "exclude_frozen_parameters": True, **FROZEN[what][1]}
    return command_line(data, **{**values, **cell(place).flags, **flags})


def trained(data, what, place, base, **flags):
    return run_ranks(cell(place).world_size, train, argv_of(data, what, place, base, **flags))[0]


def stopped(data, what, place, base, run, **flags):
    """A run that saves at STOPS_AT and ends there."""
    flags = {"save": run, "load": run, "save_interval": STOPS_AT, "exit_interval": STOPS_AT, **flags}
    return trained(data, what, place, base, **flags)


@pytest.mark.parametrize(("what", "source", "target"), PAIRS)
def test_a_run_goes_on(what, source, target, data, tmp_path):
    base = saved(tmp_path, FROZEN[what][0])
    first = stopped(data, what, source, base, tmp_path / "run")
    whole = stopped(data, what, source, base, tmp_path / "whole", exclude_frozen_parameters=None)
    assert first.digests == whole.digests
    without, kept = (read_manifest(tmp_path / name / "global_step2") for name in ("run", "whole"))
    frozen = {name for name, info in kept.parameters.items() if not info.is_trainable}
    assert frozen and set(without.parameters) == set(kept.parameters) - frozen
    assert without.common[LEFT_OUT]["parameters"] == len(frozen)
    assert {name: kept.digests[name] for name in without.digests} == without.digests
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).rglob("*") if f.is_file()) for name in ("run", "whole")]
    assert sizes[0] < 0.8 * sizes[1]
    assert verify(tmp_path / "run/global_step2").is_sound
    # Directly, and from a conversion, as the run that kept everything, and as the one that never stopped.
    convert(tmp_path / "run/global_step2", tmp_path / "universal/u")
    (tmp_path / "universal/latest_universal").write_text("u")
    found = [
        trained(data, what, target, base, load=tmp_path / "run"),
        trained(data, what, target, base, load=tmp_path / "universal", universal_checkpoint=True),
        trained(data, what, target, base, load=tmp_path / "whole", exclude_frozen_parameters=None),
    ]
    assert found[0].digests == found[1].digests == found[2].digests and found[0].losses == found[2].losses
    alone = trained(data, what, source, base, exclude_frozen_parameters=None)
    assert sorted(found[0].losses) == [3, 4]
    for step, loss in {**first.losses, **found[0].losses}.items():
        assert loss == pytest.approx(alone.losses[step], abs=2e-6), step


def test_the_base_may_be_of_any_kind(data, run, tmp_path):
    """A universal folder; and a run's own save, whose files have the names of those that leave the base out."""
    folder, base = run
    truth = trained(data, "adapters", "tp2pp1dp1-z1", base, load=folder)
    universal = convert(base, tmp_path / "universal").output
    flags = {"load": tmp_path / "native", "save": tmp_path / "native", "save_interval": 1, "exit_interval": 1}
    # A step of no length: the weights stay those of the model.
    of_base = {**dict.fromkeys(FROZEN["adapters"][1]), "exclude_frozen_parameters": None, "lr": 1e-30, "min_lr": 0.0}
    trained(data, "adapters", "tp1pp1dp2-z1", base, **{**flags, **of_base})
    for kind in (universal, tmp_path / "native"):
        found = trained(data, "adapters", "tp2pp1dp1-z1", kind, load=folder)
        assert found.digests == truth.digests and found.losses == truth.losses, kind


def test_in_bf16(data, tmp_path):
    """The base's weights are rounded when the run begins, and when it goes on: in bf16 and in fp32."""
    base = saved(tmp_path, "llama 3")
    stopped(data, "adapters", "tp1pp1dp2-z1", base, tmp_path / "run", bf16=True)
    assert read_manifest(tmp_path / "run/global_step2").common[LEFT_OUT]["dtype"] == "bfloat16"
    stopped(data, "adapters", "tp1pp1dp2-z1", base, tmp_path / "whole", bf16=True, exclude_frozen_parameters=None)
    place, keeps = "tp2pp1dp1-z1", {"load": tmp_path / "whole", "exclude_frozen_parameters": None}
    found = trained(data, "adapters", place, base, load=tmp_path / "run", bf16=True)
    truth = trained(data, "adapters", place, base, bf16=True, **keeps)
    assert found.digests == truth.digests and found.losses == truth.losses and sorted(found.losses) == [3, 4]
    # In fp32 the base is not rounded; the one that was saved was.
    wider = trained(data, "adapters", place, base, load=tmp_path / "run")
    rounded = trained(data, "adapters", place, base, **keeps)
    for step in (3, 4):
        assert 0 < abs(wider.losses[step] - rounded.losses[step]) < 2e-2, step


def test_an_asynchronous_save_and_a_damaged_one(data, tmp_path):
    """The newest is damaged: the one before is taken, and its base too."""
    base = saved(tmp_path, "llama 3")
    flags = {"save": tmp_path / "run", "load": tmp_path / "run", "save_interval": 1, "async_save": True}
    through = trained(data, "adapters", "tp1pp1dp2-z1", base, **flags)
    newest = tmp_path / "run/global_step4"
    (optimizer,) = (
        newest.glob("*dp_rank_1*optim_states.pt")
        if list(newest.glob("*dp_rank_1*"))
        else newest.glob("zero_pp_rank_1*optim_states.pt")
    )
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    again = trained(data, "adapters", "tp2pp1dp1-z1", base, load=tmp_path / "run")
    assert sorted(again.losses) == [4]
    assert again.losses[4] == pytest.approx(through.losses[4], abs=2e-6)


def test_adapters_are_exported_while_training(data, run, tmp_path):
    """Of saves that leave the base out: the same files as an export of the save by hand."""
    save = tmp_path / "run"
    trained(data, "adapters", "tp1pp1dp2-z1", run[1], save=save, save_interval=2, export_hf_interval=4)
    exported = tmp_path / "run_hf/global_step4"
    export_adapter(save / "global_step4", tmp_path / "by_hand", base=str(run[1]))
    for name in ("adapter_model.safetensors", "ucp_base.json"):
        assert (exported / name).read_bytes() == (tmp_path / "by_hand" / name).read_bytes(), name


def test_the_log_says_what_is_trained(data, run):
    """Of the whole model, however it is cut."""
    told = [
        run_ranks(2, _listen, argv_of(data, "adapters", place, run[1])) for place in ("tp2pp1dp1-z1", "tp1pp2dp1-z1")
    ]
    trained = sum(info.layout.numel for info in read_manifest(run[0] / "global_step2").parameters.values())
    for lines in (line for of_ranks in told for line in of_ranks):
        assert any(f"parameters ({trained:,} trained)" in line for line in lines), lines


def _listen(rank, world_size, argv):
    told = listen("megatron.training.build")
    build(argv, rank, world_size)
    return told


# -- what must be refused ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run folder whose save leaves out its frozen weights, and the model folder that has them."""
    folder = tmp_path_factory.mktemp("left_out")
    base = saved(folder, "llama 3")
    stopped(data, "adapters", "tp1pp1dp2-z1", base, folder / "run")
    return folder / "run", base


def test_without_a_base(data, run):
    with pytest.raises(RankFailure, match=r"(?s)leaves out the weights that are not trained.*--pretrained-checkpoint"):
        trained(data, "adapters", "tp1pp1dp2-z1", None, load=run[0], exclude_frozen_parameters=None)


def test_another_base(data, run, tmp_path):
    """One weight of one matrix is another one; and a base that has not all that is needed."""
    other = made("llama 3")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(RankFailure, match="trained beside other weights than those of --pretrained-checkpoint"):
        trained(data, "adapters", "tp2pp1dp1-z1", tmp_path / "other", load=run[0])
    with pytest.raises(RankFailure, match="leaves out its frozen weights itself"):
        trained(data, "adapters", "tp2pp1dp1-z1", run[0], load=run[0])
    with pytest.raises(RankFailure, match="does not fit this run"):
        trained(data, "adapters", "tp2pp1dp1-z1", saved(tmp_path, "llama"), load=run[0])


def test_a_run_that_freezes_others(data, run):
    with pytest.raises(RankFailure, match="this run freezes others"):
        trained(data, "adapters", "tp1pp1dp1-z1", run[1], load=run[0], freeze_parameters="layers.0.*.lora_a")


def test_a_changed_digest_of_the_base_is_seen(data, run, tmp_path):
    """What the comparison is for: with this one taken away the run would go on beside any base."""
    shutil.copytree(run[0], tmp_path / "run")
    manifest = read_manifest(tmp_path / "run/global_step2")
    told = {**manifest.common[LEFT_OUT], "digest": "0" * 32}
    write_manifest(tmp_path / "run/global_step2", replace(manifest, common={**manifest.common, LEFT_OUT: told}))
    with pytest.raises(RankFailure, match="trained beside other weights"):
        trained(data, "adapters", "tp1pp1dp1-z1", run[1], load=tmp_path / "run")


def test_tools_take_what_is_there(data, run, tmp_path, capsys):
    folder, base = run
    source = open_source(folder / "global_step2")
    assert source.manifest.parameters and all(map(is_adapter, source.manifest.parameters))
    assert cli.main(["inspect", str(folder)]) == 0
    assert f"not trained, with digest {source.manifest.common[LEFT_OUT]['digest']}" in capsys.readouterr().out
    # The same adapters, and the same base told, as of the run that keeps everything.
    stopped(data, "adapters", "tp1pp1dp2-z1", base, tmp_path / "whole", exclude_frozen_parameters=None)
    for place, name in ((folder, "one"), (tmp_path / "whole", "other")):
        export_adapter(place, tmp_path / name, base=str(base))
    for name in ("adapter_model.safetensors", "ucp_base.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name
    for export_to in (export, export_dcp):
        with pytest.raises(UnsupportedCheckpointError, match="leaves out the weights that were not trained"):
            export_to(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_converted_with_its_base_leaves_nothing_out(run, tmp_path):
    """What says so all the same: conversions of before kept the words of the checkpoint that they were made of."""
    told = read_manifest(run[0] / "global_step2").common[LEFT_OUT]
    manifest = read_manifest(convert(run[1], tmp_path / "base").output)
    frozen = {name: replace(info, is_trainable=False) for name, info in manifest.parameters.items()}
    common = {**manifest.common, LEFT_OUT: told}
    assert left_out(replace(manifest, common=common)) == told
    assert left_out(replace(manifest, common=common, parameters=frozen)) is None is left_out(manifest)


@pytest.mark.parametrize("told", [3, {}, {"digest": "0"}, {"digest": "0" * 32, "dtype": "__class__"}])
def test_what_a_stranger_says_was_left_out(told, run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    manifest = read_manifest(tmp_path / "run/global_step2")
    write_manifest(tmp_path / "run/global_step2", replace(manifest, common={**manifest.common, LEFT_OUT: told}))
    with pytest.raises(ManifestError, match=LEFT_OUT):
        read_manifest(tmp_path / "run/global_step2")
