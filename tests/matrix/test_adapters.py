"""LoRA: adapters beside the matrices of a frozen model, under every topology, and PEFT's folders in and out.

The truth is PEFT's: a model of transformers with PEFT's adapters, trained in plain torch with its AdamW on the same
samples.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from ucp.huggingface_models import ours, saved, tokens

from harness.ranks import RankFailure, run_ranks
from matrix.cells import cell
from matrix.recording import build, command_line, train
from megatron.ucp import cli
from megatron.ucp.convert import convert
from megatron.ucp.errors import ChangedWhileReadError, DigestMismatchError, UcpError, UnsupportedCheckpointError
from megatron.ucp.export import export, export_adapter, export_dcp
from megatron.ucp.naming.adapters import is_adapter
from megatron.ucp.sources import open_source

TOLERANCE = 2e-5
STEPS, MICRO_BATCHES = 3, 8
ADAPTED = {
    "llama 3": (
        ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "tp2pp1dp1-z1 tp4pp1dp1-z0 tp3pp1dp1-z1 tp2pp1dp1-cut-z2 tp1pp3dp1-z1 tp1pp1dp2-z3 tp1pp1dp2sp2-z2",
    ),
    "llama with biases": (["k_proj", "up_proj"], "tp1pp1dp1-plain-z0 tp2pp1dp1-z3 tp4pp1dp1-cut-z1"),
    "gpt2": (["c_attn", "c_proj", "c_fc"], "tp2pp1dp1-z2 tp1pp3dp1-z0"),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], "tp2pp1dp1-cut-z1 tp1pp1dp2-z1"),
    "qwen3_moe": (["q_proj", "k_proj", "v_proj", "o_proj"], "tp2pp1dp1-z1 tp1pp1dp2ep2-z1"),
}
"""Their words for the matrices, and topologies."""


def peft_model(folder, adapter, **changes):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return PeftModel.from_pretrained(base, adapter, **changes)


def made_adapter(folder, path, targets, **changes):
    """By PEFT; B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    base = AutoModelForCausalLM.from_pretrained(folder)
    is_conv = base.config.model_type == "gpt2"
    values = {"r": 3, "lora_alpha": 12, "init_lora_weights": False, "fan_in_fan_out": is_conv, **changes}
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **values)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.mul_(0.3)
    model.save_pretrained(path)
    return path


def argv_of(data, folder, place, **flags):
    """No flag says what the model is."""
    of_model = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    of_model += ("hidden_dropout", "attention_dropout")
    values = {**dict.fromkeys(of_model), "use_checkpoint_args": True, "load": folder, "finetune": True, "iters": STEPS}
    return command_line(data, **{**values, "vocab_size": 100, "lr": 1e-2, **cell(place).flags, **flags})


def _micro_batches(rank, world_size, argv):
    batches = build(argv, rank, world_size).batches.train(0)
    return [batch for batch, _ in zip(batches, range(STEPS * MICRO_BATCHES))]


def trained_by_peft(model, micro_batches, rates, weight_decay=0.1, states=None):
    """(losses, gradient norms): with the flags of `command_line`. `states`: of AdamW's, by parameter."""
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1.0, weight_decay=weight_decay, foreach=False)
    for param, state in (states or {}).items():
        optimizer.state[param] = state
    losses, norms = [], []
    model.train()
    for step in range(len(rates)):
        optimizer.zero_grad()
        total = 0.0
        for batch in micro_batches[step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES]:
            logits = model(batch["tokens"]).logits
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
            loss = (nll * batch["loss_mask"]).sum() / batch["loss_mask"].sum() / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(params, 0.5).item())
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
    return losses, norms


def is_as_theirs(curves, losses, norms):
    assert sorted(curves.losses) == [1, 2, 3] and len(losses) == len(norms) == 3
    return all(
        math.isclose(curves.losses[step], losses[step - 1], abs_tol=TOLERANCE)
        and math.isclose(curves.grad_norms[step], norms[step - 1], rel_tol=1e-4)
        for step in (1, 2, 3)
    )


@pytest.mark.parametrize("name", ADAPTED)
def test_training_is_as_pefts_under_every_topology(name, data, tmp_path):
    targets, places = ADAPTED[name]
    folder = saved(tmp_path, name)
    adapter = made_adapter(folder, tmp_path / "adapter", targets)
    start = convert(folder, tmp_path / "start", adapter=adapter).output
    curves = {}
    for place in places.split():
        argv = argv_of(data, start, place, save=tmp_path / place, save_interval=STEPS, moe_loss_coeff=0)
        curves[place] = run_ranks(cell(place).world_size, train, argv)[0]
    first = places.split()[0]
    micro_batches = run_ranks(1, _micro_batches, argv_of(data, start, "tp1pp1dp1-plain-z0"))[0]
    reference = peft_model(folder, adapter, is_trainable=True)
    rates = [curves[first].learning_rates[step] for step in (1, 2, 3)]
    truth = trained_by_peft(reference, micro_batches, rates)
    for place, found in curves.items():
        assert is_as_theirs(found, *truth), (place, found, truth)
    # Out again: what PEFT then computes is what its own adapters compute.
    exported = export_adapter(tmp_path / first, tmp_path / "out", base=str(folder))
    assert exported.num_tensors == len(load_file(adapter / "adapter_model.safetensors"))
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    given = json.loads((adapter / "adapter_config.json").read_text())
    same = ("r", "lora_alpha", "fan_in_fan_out", "bias", "task_type", "peft_type", "base_model_name_or_path")
    assert [written[key] for key in same] == [given[key] for key in same]
    assert sorted(written["target_modules"]) == sorted(given["target_modules"])
    with torch.no_grad():
        theirs, found = (model.eval()(tokens()).logits for model in (reference, peft_model(folder, tmp_path / "out")))
        base = reference.get_base_model()
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)
    with reference.disable_adapter(), torch.no_grad():
        assert (base(tokens()).logits - theirs).abs().max() > 0.05  # the adapters matter
    # And in: the same bytes.
    again = convert(folder, tmp_path / "again", adapter=tmp_path / "out").manifest
    digests = open_source(tmp_path / first).manifest.digests
    assert {key: states["fp32"] for key, states in again.digests.items()} == {
        key: states["fp32"] for key, states in digests.items()
    }


def test_a_mistake_in_an_adapter_shows_in_the_losses(data, tmp_path):
    folder = saved(tmp_path, "llama 3")
    adapter = made_adapter(folder, tmp_path / "adapter", ["k_proj", "v_proj"])
    truth = run_ranks(
        1, train, argv_of(data, convert(folder, tmp_path / "one", adapter=adapter).output, "tp1pp1dp1-z0")
    )[0]
    tensors = load_file(adapter / "adapter_model.safetensors")
    swapped = {
        key.replace("k_proj", "?").replace("v_proj", "k_proj").replace("?", "v_proj"): tensors[key] for key in tensors
    }
    save_file(swapped, adapter / "adapter_model.safetensors", {"format": "pt"})
    other = run_ranks(
        1, train, argv_of(data, convert(folder, tmp_path / "two", adapter=adapter).output, "tp1pp1dp1-z0")
    )[0]
    losses, norms = ([values[step] for step in (1, 2, 3)] for values in (truth.losses, truth.grad_norms))
    assert is_as_theirs(truth, losses, norms) and not is_as_theirs(other, losses, norms)


# -- a run that begins with a model, stops and goes on ----------------------------------------------------------------

BEGINS = {
    "llama 3": "tp1pp1dp1-plain-z0 tp2pp1dp1-z1 tp1pp1dp2-z3 tp4pp1dp1-z1 tp1pp3dp1-z1",
    "gpt2": "tp1pp1dp1-plain-z0 tp2pp1dp1-cut-z2",
}


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """(folder, run folder saved at step 2, the curves of one that never stopped)."""
    path = tmp_path_factory.mktemp("begun")
    folder = saved(path, "llama 3")
    flags = {"lora_rank": 4, "lora_alpha": 16, "save_interval": 2}
    flags |= {"finetune": None, "pretrained_checkpoint": folder, "iters": 4}
    whole = run_ranks(2, train, argv_of(data, path / "whole", "tp2pp1dp1-z1", **flags, save=path / "whole"))[0]
    run = path / "run"
    run_ranks(2, train, argv_of(data, run, "tp2pp1dp1-z1", **flags, save=run, exit_interval=2))
    return folder, run, whole


@pytest.mark.parametrize("name", BEGINS)
def test_adapters_begin_with_nothing_under_any_topology(name, data, tmp_path):
    folder = saved(tmp_path, name)
    weights = open_source(convert(folder, tmp_path / "universal").output).manifest.digests
    plain = run_ranks(1, train, argv_of(data, folder, "tp1pp1dp1-plain-z0"))[0]
    curves = []
    for place in BEGINS[name].split():
        fused = {"lora_fused": True} if name == "gpt2" else {}
        found = run_ranks(cell(place).world_size, train, argv_of(data, folder, place, lora_rank=4, **fused))[0]
        assert found.losses[1] == pytest.approx(plain.losses[1], abs=2e-6)
        frozen = {key: states for key, states in found.digests.items() if not is_adapter(key)}
        assert frozen == weights and all(set(states) == {"fp32"} for states in frozen.values())
        curves.append(found)
    for found in curves[1:]:
        for step in (1, 2, 3):
            assert found.losses[step] == pytest.approx(curves[0].losses[step], abs=TOLERANCE)
            assert found.grad_norms[step] == pytest.approx(curves[0].grad_norms[step], rel=1e-4)
    assert curves[0].losses[3] != pytest.approx(plain.losses[3], abs=1e-4)


def test_the_command_line_that_began_goes_on(begun, data):
    folder, run, whole = begun
    flags = {"lora_rank": 4, "lora_alpha": 16, "finetune": None, "pretrained_checkpoint": folder, "iters": 4}
    found = run_ranks(1, train, argv_of(data, run, "tp1pp1dp1-z0", **flags))[0]
    assert sorted(found.losses) == [3, 4] and found.losses[4] == pytest.approx(whole.losses[4], abs=TOLERANCE)


@pytest.mark.parametrize("place", ["tp1pp1dp1-z0", "tp1pp1dp2-z3", "tp4pp1dp1-cut-z2", "tp1pp3dp1-z1"])
def test_a_run_with_adapters_goes_on_under_another_topology(begun, data, tmp_path, place):
    _, run, whole = begun
    argv = argv_of(data, run, place, finetune=None, iters=4)
    found = run_ranks(cell(place).world_size, train, argv)[0]
    assert sorted(found.losses) == [3, 4]
    for step in (3, 4):
        assert found.losses[step] == pytest.approx(whole.losses[step], abs=TOLERANCE)
        assert found.grad_norms[step] == pytest.approx(whole.grad_norms[step], rel=1e-4)
    # By way of universal too, and its own flags agree with what the checkpoint says.
    universal = convert(run, tmp_path / "universal").output
    argv = argv_of(data, universal, place, finetune=None, iters=4, lora_rank=4, lora_alpha=16)
    assert run_ranks(cell(place).world_size, train, argv)[0].losses == found.losses


def test_adapters_of_some_matrices_are_named_by_flags_and_exported_while_training(data, tmp_path):
    folder = saved(tmp_path, "llama 3")
    flags = {"save": tmp_path / "run", "save_interval": 2, "iters": 2, "export_hf_interval": 2, "lora_rank": 2}
    argv = [*argv_of(data, folder, "tp2pp1dp1-z1", **flags), "--lora-target-modules", "v_proj", "q_proj"]
    found = run_ranks(2, train, argv)[0]
    adapters = [name for name in found.digests if is_adapter(name)]
    assert sorted(adapters) == [f"layers.{n}.attention.query_key_value.lora_{k}" for n in range(3) for k in "ab"]
    out = tmp_path / "run_hf/global_step2"
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["base_model_name_or_path"] == str(folder)
    with torch.no_grad():
        logits = peft_model(folder, out)(tokens()).logits
    universal = open_source(convert(folder, tmp_path / "universal", adapter=out).output)
    torch.testing.assert_close(ours(universal, tokens()), logits, rtol=0, atol=TOLERANCE)


def test_another_adapter_or_none_is_refused(begun, data):
    folder, run, _ = begun
    for flags, told in (
        ({"lora_rank": 5}, "model.lora_rank: 4 in the Source, 5 here"),
        ({"lora_alpha": 8}, "model.lora_alpha: 16.0 in the Source, 8.0 here"),
        ({"lora_rank": 0}, "adapters without a rank"),
    ):
        with pytest.raises((RankFailure, UcpError), match=told):
            run_ranks(1, train, argv_of(data, run, "tp1pp1dp1-z0", finetune=None, **flags))
    # Only a start with weights alone leaves adapters as they begin.
    with pytest.raises(RankFailure, match="parameters the Source lacks: layers.0.attention.dense.lora_a"):
        run_ranks(1, train, argv_of(data, folder, "tp1pp1dp1-z0", finetune=None, lora_rank=4))
    without = ["--num-key-value-heads", "2", "--ffn-hidden-size", "40", "--kv-channels", "16", "--no-load-optim"]
    flags = {"use_checkpoint_args": None, "finetune": None, "num_layers": 3, "hidden_size": 32, "swiglu": True,
             "num_attention_heads": 4, "normalization": "rmsnorm", "disable_bias_linear": True,
             "untie_embeddings_and_output_weights": True, "use_rotary_position_embeddings": True}  # fmt: skip
    with pytest.raises(RankFailure, match="model.lora_rank: 4 in the Source, 0 here"):
        run_ranks(1, train, [*argv_of(data, run, "tp1pp1dp1-z0", **flags), *without])


def test_formats_without_a_place_for_adapters_are_refused(begun, tmp_path):
    folder, run, _ = begun
    for write in (export, export_dcp):
        with pytest.raises(UnsupportedCheckpointError, match="--format peft"):
            write(run, tmp_path / "out")
    with pytest.raises(UnsupportedCheckpointError, match="has no adapters"):
        export_adapter(folder, tmp_path / "out")
    with pytest.raises(UnsupportedCheckpointError, match="q, k and v have an adapter each"):
        export_adapter(run, tmp_path / "out", family="gpt2")
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_base_are_refused(begun, tmp_path, capsys, caplog):
    folder, run, _ = begun
    out = tmp_path / "out"
    assert cli.main(["export", str(run), str(out), "--format", "peft", "--base", str(folder)]) == 0
    assert cli.main(["import", str(folder), str(tmp_path / "good"), "--adapter", str(out)]) == 0
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(DigestMismatchError, match="of another base model"):
        convert(other, tmp_path / "bad", adapter=out)
    assert not (tmp_path / "bad").exists()
    # In another precision it cannot be told, and that is said.
    assert "is not checked" not in caplog.text
    saved_in = {key: value.bfloat16() for key, value in tensors.items()}
    save_file(saved_in, other / "model.safetensors", {"format": "pt"})
    assert cli.main(["import", str(other), str(tmp_path / "rounded"), "--adapter", str(out)]) == 0
    assert "that they are the same is not checked" in caplog.text
    assert cli.main(["export", str(run), str(tmp_path / "x"), "--format", "hf", "--base", "y"]) == 1
    assert "--base" in capsys.readouterr().err


def of_config(**values):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def of_tensors(change):
    def changed(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return changed


def _without(tensors, part):
    return {key: value for key, value in tensors.items() if part not in key}


REFUSED = {
    "another method": (of_config(peft_type="IA3"), "peft_type 'IA3'"),
    "no rank": (of_config(r=None), "r None"),
    "another rank": (of_config(r=4), "(4, 32) is expected"),
    "ranks of their own": (of_config(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "DoRA": (of_config(use_dora=True, use_rslora=True, bias="all"), "3 reason"),
    "a key that is not known": (of_config(sparse_magic=0.5), "sparse_magic 0.5"),
    "another start": (of_config(init_lora_weights="pissa"), "changed the base"),
    "no number": (of_config(lora_alpha=float("nan")), "lora_alpha"),
    "nested": (of_config(target_modules=[[[["q"]]]] * 3, r=[[3]]), "r [[3]]"),
    "a block without": (of_tensors(lambda t: _without(t, "layers.1.")), "missing"),
    "half of one": (of_tensors(lambda t: _without(t, "q_proj.lora_B")), "missing"),
    "none": (of_tensors(lambda t: {"x": torch.ones(2)}), "no adapter of a matrix"),
    "another name": (
        of_tensors(lambda t: {**t, "base_model.model.lm_head.lora_A.weight": torch.ones(3, 32)}), "no place",
    ),
    "another shape": (
        of_tensors(lambda t: {k: v[:-1] if "o_proj.lora_B" in k else v for k, v in t.items()}), "(31, 3)",
    ),
    "no digest": (lambda folder: (folder / "ucp_base.json").write_text('{"digest": 5}'), "of which base"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
}  # fmt: skip


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("pristine")
    folder = saved(path, "llama 3")
    return folder, made_adapter(folder, path / "adapter", ["q_proj", "o_proj"])


@pytest.mark.parametrize("case", REFUSED)
def test_a_strangers_adapter_that_is_not_known_is_refused_whole(pristine, tmp_path, case):
    folder, adapter = pristine
    change, told = REFUSED[case]
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    change(copy)
    with pytest.raises(UcpError, match="^") as error:
        convert(folder, tmp_path / "out", adapter=copy)
    assert told in str(error.value), error.value
    assert not (tmp_path / "out").exists()


def test_the_unchanged_one_is_taken(pristine, tmp_path):
    """Else the refusals above prove nothing. A .bin is read too."""
    folder, adapter = pristine
    one = convert(folder, tmp_path / "one", adapter=adapter).digest
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    torch.save(load_file(copy / "adapter_model.safetensors"), copy / "adapter_model.bin")
    (copy / "adapter_model.safetensors").unlink()
    assert convert(folder, tmp_path / "two", adapter=copy).digest == one


def test_a_giant_name_is_no_adapter(pristine, tmp_path):
    """Told at once: no search that takes a time of the square of its length."""
    folder, adapter = pristine
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    of_tensors(lambda tensors: {"base_model.model." + ".1.1" * 250_000: torch.ones(1), **tensors})(copy)
    with pytest.raises(UnsupportedCheckpointError, match="have no place in a llama"):
        convert(folder, tmp_path / "out", adapter=copy)


def test_an_adapter_that_changes_meanwhile_is_seen(pristine, tmp_path):
    folder, adapter = pristine
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    with pytest.raises(ChangedWhileReadError, match="adapter_config.json"):
        convert(folder, tmp_path / "out", adapter=copy, progress=lambda *_: (copy / "adapter_config.json").touch())
    assert not (tmp_path / "out").exists()
