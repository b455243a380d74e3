"""What programs of others saved of a transformers model goes on in pretrain_gpt.py, moments included.

DeepSpeed's files (as Trainer and Accelerate write them) and PyTorch's DCP. The state is held against what DeepSpeed
itself says and what the program had in memory, and the next loss against transformers' with the trained weights.
"""

from __future__ import annotations

import pytest
import torch
from ucp.dcp_program import fsdp2
from ucp.huggingface_models import made, tokens

from harness.ranks import run_ranks
from matrix.recording import build, command_line, train
from megatron.ucp.convert import convert
from megatron.ucp.execute import read_into
from megatron.ucp.runs import whole_runs
from megatron.ucp.sources import open_source
from megatron.ucp.sources.renamed import with_names_of

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def deepspeed_program(rank, world_size, folder, name, zero_stage):
    """As Trainer and Accelerate: the parameters keep transformers' names."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    model = made(name)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": zero_stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for _ in range(3):
        engine.backward(engine(tokens(), labels=tokens()).loss)
        engine.step()
    truth = {}
    for key, param in engine.module.named_parameters():
        truth[key, "fp32"] = safe_get_full_fp32_param(param).detach().clone()
        for state in STATES[1:]:
            truth[key, state] = safe_get_full_optimizer_state(param, state).detach().clone()
    engine.save_checkpoint(folder)
    return truth


def values(source, name, state):
    layout = source.manifest.parameters[name].layout
    flat = torch.zeros(layout.numel)
    read_into(source, name, state, whole_runs(layout.numel), flat)
    return flat.view(layout.shape)


@pytest.mark.parametrize(("name", "zero_stage", "ranks"), [("llama 3", 2, 2), ("gpt2", 1, 2), ("qwen3", 3, 3)])
def test_deepspeeds_files_under_our_names(name, zero_stage, ranks, tmp_path):
    truth = run_ranks(ranks, deepspeed_program, tmp_path / "run", name, zero_stage)[0]
    made(name).save_pretrained(tmp_path / "like")
    converted = convert(tmp_path / "run", tmp_path / "universal", like=tmp_path / "like")
    live = with_names_of(open_source(tmp_path / "run"), tmp_path / "like")
    prefix = "transformer.h" if name == "gpt2" else "model.layers"
    for source in (open_source(converted.output), live):
        assert all(info.states == STATES and info.step == 3 for info in source.manifest.parameters.values())
        groups = source.manifest.optimizer.groups  # theirs is one, whose values both of ours take
        assert {key: group["lr"] for key, group in groups.items()} == {"decay": 1e-3, "no_decay": 1e-3}
        for state in STATES:
            for layer in range(3):
                found = values(source, f"layers.{layer}.attention.query_key_value.weight", state)
                if name == "gpt2":
                    expected = truth[f"{prefix}.{layer}.attn.c_attn.weight", state].T
                else:
                    expected = torch.cat(
                        [truth[f"{prefix}.{layer}.self_attn.{part}_proj.weight", state] for part in "qkv"]
                    )
                assert torch.equal(found, expected)


@pytest.mark.parametrize("place", ["tp2 zero1", "dp2 zero3"])
def test_it_goes_on_in_our_engine(place, data, tmp_path):
    """Loading proves every state by its digest; what the model then computes is what transformers computes."""
    truth, losses = run_ranks(2, fsdp2, tmp_path / "dcp", "llama 3")[0]
    made("llama 3").save_pretrained(tmp_path / "like")
    convert(tmp_path / "dcp", tmp_path / "runs/from_fsdp", like=tmp_path / "like")
    flags = {"tp": 2, "zero": 1} if place.startswith("tp2") else {"tp": 1, "zero": 3}
    of_model = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    argv = command_line(
        data,
        **{
            **dict.fromkeys((*of_model, "hidden_dropout", "attention_dropout")),
            "use_checkpoint_args": True,
            "load": tmp_path / "runs",
            "save": tmp_path / "ours",
            "save_interval": 2,
            "iters": 2,
            **flags,
        },
    )
    curves = run_ranks(2, train, argv)[0]
    assert sorted(curves.losses) == [1, 2] and len(losses) == 3
    saved = open_source(tmp_path / "ours").manifest
    assert {info.step for info in saved.parameters.values()} == {5.0}  # three of theirs, two of ours
    model = made("llama 3")
    model.load_state_dict({key: value for key, value in truth.items() if " " not in key})
    samples = run_ranks(1, _samples, [*argv, "--micro-batch-size", "1", "--tensor-model-parallel-size", "1"])[0]
    with torch.no_grad():
        nll = [
            float(torch.nn.functional.cross_entropy(model(batch["tokens"]).logits[0], batch["labels"][0]))
            for batch in samples
        ]
    assert curves.losses[1] == pytest.approx(sum(nll) / len(nll), abs=2e-5)


def _samples(rank, world_size, argv):
    argv = [*argv[: argv.index("--save")], *argv[argv.index("--save") + 2 :]]
    argv = [*argv[: argv.index("--save-interval")], *argv[argv.index("--save-interval") + 2 :]]
    run = build(argv, rank, world_size)
    return [sample for sample, _ in zip(run.batches.train(0), range(8))]
