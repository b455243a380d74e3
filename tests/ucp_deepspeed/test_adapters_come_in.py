"""What Hugging Face's Trainer saved of a PEFT model goes on in pretrain_gpt.py: its adapters with their moments, beside
a base that comes from the model's folder.

Truth: PEFT's model and torch's AdamW, with the moments as the checkpoint has them under Trainer's names.
"""

import functools
import shutil

import pytest
import torch
from ucp_deepspeed.trainer_program import SAVED_AT, save

from harness.ranks import run_ranks
from matrix.cells import cell
from matrix.recording import build, train, write_dataset
from matrix.test_adapters import argv_of, peft_model, trained_by_peft
from megatron.ucp import cli
from megatron.ucp.convert import convert
from megatron.ucp.errors import ChangedWhileReadError, DigestMismatchError, UnsupportedCheckpointError
from megatron.ucp.execute import read_into
from megatron.ucp.export import export_adapter
from megatron.ucp.runs import whole_runs
from megatron.ucp.sources import find_checkpoint, open_source

SAVES = [(1, 2, True), (2, 3, False), (3, 2, True), (3, 1, False)]
"""(ZeRO stage, ranks, whether our line was in the program)."""


def base_model(folder, seed=5):
    """trainer_program's, before PEFT."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("trainer")
    base = base_model(path / "base")

    @functools.cache
    def checkpoint(stage, ranks, installs):
        out = path / f"z{stage}r{ranks}"
        run_ranks(ranks, save, str(out), stage, {"lora_on": 5}, installs, timeout=300)
        return out / f"checkpoint-{SAVED_AT}"

    return base, checkpoint


@pytest.fixture(scope="module")
def data64(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data64") / "d", vocab_size=64)


def value(source, name, state):
    layout = source.manifest.parameters[name].layout
    out = torch.zeros(layout.numel)
    read_into(source, name, state, whole_runs(layout.numel), out)
    return out.view(layout.shape)


PLACES = ["tp2pp1dp1-z1", "tp1pp2dp1-z0", "tp1pp1dp2-z3", "tp1pp1dp1-plain-z0"]


@pytest.mark.parametrize("how, place", list(zip(SAVES, PLACES, strict=True)), ids=str)
def test_training_goes_on_as_trainers(how, place, made, data64, tmp_path, caplog):
    base, checkpoint = made[0], made[1](*how)
    inner = open_source(find_checkpoint(checkpoint))
    start = convert(checkpoint, tmp_path / "run/start", like=base).output
    # Only our line writes which base it was.
    assert ("beside this base is not checked" in caplog.text) is (not how[2])
    flags = {"finetune": None, "vocab_size": 63, "iters": SAVED_AT + 3}
    argv = argv_of(data64, start.parent, place, **flags)
    found = run_ranks(cell(place).world_size, train, argv)[0]
    steps = [SAVED_AT + number for number in (1, 2, 3)]
    assert sorted(found.losses) == steps
    model = peft_model(base, checkpoint, is_trainable=True)
    states, num_moments = {}, 0
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert torch.equal(value(inner, name, "fp32"), param)
            moments = {key: value(inner, name, key) for key in ("exp_avg", "exp_avg_sq")}
            num_moments += all(moment.abs().max() > 0 for moment in moments.values())
            states[param] = {"step": torch.tensor(float(inner.manifest.parameters[name].step)), **moments}
    assert len(states) == num_moments == 8  # q and v of two blocks, A and B of each
    argv = argv_of(data64, start.parent, "tp1pp1dp1-plain-z0", **flags)
    micro_batches = run_ranks(1, _micro_batches_from, argv)[0]
    rates = [found.learning_rates[step] for step in steps]
    losses, norms = trained_by_peft(model, micro_batches, rates, weight_decay=0.0, states=states)
    for step, loss, norm in zip(steps, losses, norms, strict=True):
        assert found.losses[step] == pytest.approx(loss, abs=2e-5)
        assert found.grad_norms[step] == pytest.approx(norm, rel=1e-4)
    # Without the moments it would be another run.
    fresh = trained_by_peft(peft_model(base, checkpoint, is_trainable=True), micro_batches, rates, weight_decay=0.0)
    assert abs(fresh[0][2] - losses[2]) > 1e-4


def _micro_batches_from(rank, world_size, argv):
    """From where the run goes on."""
    run = build(argv, rank, world_size)
    batches = run.batches.train(run.progress.consumed_train_samples)
    return [batch for batch, _ in zip(batches, range(3 * 8))]


def test_back_to_peft_bitwise(made, tmp_path):
    base, checkpoint = made[0], made[1](1, 2, True)
    convert(checkpoint, tmp_path / "start", like=base)
    export_adapter(tmp_path / "start", tmp_path / "out")
    from safetensors.torch import load_file

    one, other = (load_file(path / "adapter_model.safetensors") for path in (checkpoint, tmp_path / "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_another_base_is_refused(made, tmp_path):
    checkpoint = made[1](1, 2, True)
    other = base_model(tmp_path / "other", seed=6)
    with pytest.raises(DigestMismatchError, match="beside another base model"):
        convert(checkpoint, tmp_path / "out", like=other)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_alone_needs_its_configuration(made, tmp_path):
    base, checkpoint = made[0], made[1](1, 2, True)
    tag = shutil.copytree(find_checkpoint(checkpoint), tmp_path / "alone/global_step3")
    with pytest.raises(UnsupportedCheckpointError, match="alpha is in no other file"):
        convert(tag, tmp_path / "out", like=base)
    arguments = ["convert", str(tag), str(tmp_path / "out"), "--like", str(base), "--adapter", str(checkpoint)]
    assert cli.main(arguments) == 0
    assert (
        open_source(tmp_path / "out").manifest.digests
        == convert(checkpoint, tmp_path / "o", like=base).manifest.digests
    )


@pytest.mark.parametrize("has_base", [True, False], ids=["with its base", "adapters alone"])
def test_a_dcp_of_a_peft_model(has_base, made, tmp_path):
    """Whoever saved it: names in the model's state_dict, the base's matrices under `base_layer`."""
    import torch.distributed.checkpoint as dcp

    base, checkpoint = made[0], made[1](1, 2, True)
    weights = peft_model(base, checkpoint).state_dict()
    kept = {name: weight for name, weight in weights.items() if has_base or "lora_" in name}
    assert any("base_layer" in name for name in kept) is has_base
    dcp.save({"model": kept}, checkpoint_id=tmp_path / "dcp")
    found = convert(tmp_path / "dcp", tmp_path / "out", like=base, adapter=checkpoint)
    expected = convert(base, tmp_path / "expected", adapter=checkpoint)
    assert found.digest == expected.digest and len(found.manifest.parameters) == len(expected.manifest.parameters)
    trained = {name for name, info in found.manifest.parameters.items() if info.is_trainable}
    assert has_base or all("lora_" in name for name in trained)


def test_a_base_that_changes_meanwhile_is_seen(made, tmp_path):
    checkpoint = made[1](1, 2, True)
    base = shutil.copytree(made[0], tmp_path / "base")
    with pytest.raises(ChangedWhileReadError, match="config.json"):
        convert(checkpoint, tmp_path / "out", like=base, progress=lambda *_: (base / "config.json").touch())
    assert not (tmp_path / "out").exists()
