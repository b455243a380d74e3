"""From a model folder into runs of every topology, and from runs of every topology into a model folder.

What transformers computes with the same weights is the truth: the first loss of a run that starts from its
folder, and the logits of what is exported. Two steps later the topologies must agree to rounding, as ever.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.numpy import load_file
from ucp.huggingface_models import MODELS as THEIRS
from ucp.huggingface_models import ours, saved, tokens

from harness.ranks import RankFailure, run_ranks
from matrix.cells import cell
from matrix.recording import build, command_line, listen, train
from megatron.ucp.convert import convert
from megatron.ucp.export import export
from megatron.ucp.huggingface.families import FAMILIES
from megatron.ucp.sources import open_source
from megatron.ucp.verify import verify

TOLERANCE = 2e-5
LLAMA = {
    "hidden_size": 24, "normalization": "rmsnorm", "swiglu": True, "ffn_hidden_size": 40, "disable_bias_linear": True,
    "use_rotary_position_embeddings": True,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "expert_interval": 1, "topk": 2, "moe_ffn_hidden_size": 20}
RUNS = {
    "gpt": {},
    "tied": {**LLAMA, "num_key_value_heads": 2},
    "llama": {**LLAMA, "num_key_value_heads": 2, "untie_embeddings_and_output_weights": True,
              "add_attention_bias": True},
    "qwen2": {**LLAMA, "num_key_value_heads": 1, "add_qkv_bias": True},
    "qwen3": {**LLAMA, "num_attention_heads": 9, "kv_channels": 4, "num_key_value_heads": 3, "qk_layernorm": True},
    "bloom": {"hidden_size": 24, "num_attention_heads": 12, "position_embedding_type": "alibi",
              "embed_layernorm": True},
    "neox": {"hidden_size": 24, "num_attention_heads": 6, "position_embedding_type": "rope", "rotary_percent": 0.5,
             "use_parallel_residual": True, "exact_gelu": True},
    "mixtral": {**LLAMA, **EXPERTS, "untie_embeddings_and_output_weights": True},
    "phimoe": {**LLAMA, **EXPERTS, "normalization": "layernorm", "add_attention_bias": True, "num_key_value_heads": 2,
               "untie_embeddings_and_output_weights": True, "add_output_layer_bias": True,
               "moe_router_score_function": "sparsemixer", "moe_sparsemixer_eps": 0.3,
               "rope_scaling_type": "longrope", "rope_original_max_position_embeddings": 12,
               "rope_short_factors": (1.0, 1.5, 2.0), "rope_long_factors": (2.0, 3.0, 4.0),
               "rope_short_mscale": 1.2, "rope_long_mscale": 1.3},
    "qwen3moe": {**LLAMA, **EXPERTS, "expert_interval": 2, "qk_layernorm": True, "no_moe_normalize_topk": True},
}  # fmt: skip
OUT = {
    "gpt-tp1pp1dp1-plain-z0": "gpt2",
    "gpt-tp3pp1dp1-z1": "gpt2",
    "gpt-tp2pp2dp1-z1": "gpt2",
    "tied-tp2pp2dp1-z1": "llama",
    "llama-tp4pp1dp1-z0": "llama",
    "llama-tp1pp1dp4-z3": "llama",
    "qwen2-tp2pp1dp1-cut-z1": "qwen2",
    "qwen3-tp3pp1dp1-z2": "qwen3",
    "bloom-tp3pp1dp1-z1": "bloom",
    "bloom-tp1pp2dp2-z1": "bloom",
    "neox-tp2pp1dp1-z3": "gpt_neox",
    "mixtral-tp1pp1dp2ep2-z1": "mixtral",
    "mixtral-tp2pp1dp2ep2-z3": "mixtral",
    "phimoe-tp2pp1dp2ep2-z1": "phimoe",
    "qwen3moe-tp1pp1dp4ep4-z1": "qwen3_moe",
    "qwen3moe-tp1pp2dp2ep2-z0": "qwen3_moe",
}
"""The run that is exported, and the family that it must be found to be of."""


def _logits(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(tokens()).logits


@pytest.mark.parametrize("name", OUT)
def test_what_is_exported_computes_what_was_trained(name, data, tmp_path):
    place = cell(name)
    argv = command_line(
        data, **{**RUNS[place.model], **place.flags, "iters": 3, "save": tmp_path / "run", "save_interval": 3}
    )
    run_ranks(place.world_size, train, argv)
    native = open_source(tmp_path / "run")
    result = export(tmp_path / "run", tmp_path / "out", num_workers=1)
    assert result.family == OUT[name] and result.dtype == "float32" and not result.notes
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == 101  # no padding, whatever tp is
    torch.testing.assert_close(_logits(tmp_path / "out"), ours(native, tokens()), rtol=0, atol=TOLERANCE)
    # From a conversion the same bytes; and back again the same state.
    converted = convert(tmp_path / "run", tmp_path / "universal")
    export(converted.output, tmp_path / "again")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)
    weights = {key: states["fp32"] for key, states in native.manifest.digests.items()}
    back = convert(tmp_path / "out", tmp_path / "back")
    assert {key: states["fp32"] for key, states in back.manifest.digests.items()} == weights
    assert verify(tmp_path / "back").is_sound


@pytest.mark.parametrize("how", [{}, {"async_save": True}])
def test_exports_while_training(how, data, tmp_path):
    """Of every second save; the last is waited for, and the run ends where one that exports nothing ends."""
    flags = {**RUNS["llama"], **cell("llama-tp2pp1dp1-z1").flags, "save_interval": 1, **how}
    argv = command_line(data, **{**flags, "iters": 4, "save": tmp_path / "run", "export_hf_interval": 2})
    exporting = run_ranks(2, train, argv)[0]
    alone = run_ranks(2, train, command_line(data, **{**flags, "iters": 4, "save": tmp_path / "alone"}))[0]
    assert exporting.digests == alone.digests and exporting.losses == alone.losses
    assert {path.name for path in (tmp_path / "run_hf").iterdir()} == {"global_step2", "global_step4"}
    for step in (2, 4):
        native = open_source(tmp_path / f"run/global_step{step}")
        logits = _logits(tmp_path / f"run_hf/global_step{step}")
        torch.testing.assert_close(logits, ours(native, tokens()), rtol=0, atol=TOLERANCE)


def test_an_export_that_fails_ends_no_run(data, tmp_path):
    flags = {**RUNS["llama"], "save_interval": 2, "iters": 4, "save": tmp_path / "run", "export_hf_interval": 2}
    (tmp_path / "run_hf").write_text("no folder")
    curves, told = run_ranks(1, _train_and_listen, command_line(data, **flags))[0]
    assert sorted(curves.losses) == [1, 2, 3, 4]
    assert sum("was not exported" in line for line in told) == 2, told
    (tmp_path / "run_hf").unlink()
    _, told = run_ranks(1, _train_and_listen, command_line(data, **{**flags, "load": tmp_path / "run", "iters": 6}))[0]
    assert sum(line.startswith("exported ") and "global_step6" in line for line in told) == 1, told


def _train_and_listen(rank, world_size, argv):
    told = listen("megatron.training.hub_exports")
    return train(rank, world_size, argv), told


def test_exports_of_a_model_with_no_name_there_are_refused_before_training(data, tmp_path):
    flags = {**RUNS["mixtral"], "moe_shared_expert_intermediate_size": 12, "save": tmp_path / "run"}
    with pytest.raises(RankFailure, match="moe_shared_expert_intermediate_size is 12, not 0"):
        run_ranks(2, train, command_line(data, **{**flags, "save_interval": 1, "export_hf_interval": 1}))
    assert not list(tmp_path.glob("run/global_step*"))


def test_a_model_with_no_name_there_is_refused(data, tmp_path):
    flags = {**RUNS["mixtral"], "moe_shared_expert_intermediate_size": 12}
    argv = command_line(data, **{**flags, "iters": 1, "save": tmp_path / "run", "save_interval": 1})
    run_ranks(1, train, argv)
    with pytest.raises(Exception, match="moe_shared_expert_intermediate_size is 12, not 0"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- from a folder into runs -------------------------------------------------------------------------------------------

INTO = {
    "llama 3": "tp1pp1dp1-plain-z0 tp2pp1dp1-z1 tp1pp1dp2-z3 tp2pp1dp1-cut-z2 tp1pp3dp1-z1 tp1pp1dp2sp2-z1",
    "llama longrope": "tp1pp1dp1-plain-z0 tp2pp1dp1-z1 tp1pp1dp2sp2-z1",
    "gpt2": "tp1pp1dp1-plain-z0 tp4pp1dp1-z0 tp1pp3dp1-z0 tp2pp1dp1-z3",
    "bloom": "tp1pp1dp1-plain-z0 tp3pp1dp1-z1 tp1pp1dp2-z3",
    "mixtral": "tp1pp1dp1-plain-z0 tp1pp1dp2ep2-z1 tp2pp1dp2ep2-z0 tp1pp1dp4ep2-z3",
    "qwen3_moe": "tp1pp1dp1-plain-z0 tp2pp1dp1-z1 tp1pp1dp4ep4-z2",
    "qwen2": "tp1pp1dp1-plain-z0 tp4pp1dp1-z1",
}


def _argv(data, folder, place, **flags):
    """No flag says what the model is."""
    of_model = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    of_model += ("hidden_dropout", "attention_dropout")
    values = {**dict.fromkeys(of_model), "use_checkpoint_args": True, "load": folder, "finetune": True, "iters": 3}
    # The words of a NullTokenizer, which adds the end of a document.
    return command_line(data, **{**values, "vocab_size": 100, "lr": 1e-3, **place.flags, **flags})


def _first_batch(rank, world_size, argv):
    run = build(argv, rank, world_size)
    model, batch = run.config.model, next(run.batches.train(0))
    assert (model.hidden_dropout, model.attention_dropout) == (0.0, 0.0)
    return batch, [sample for sample, _ in zip(run.batches.train(0), range(8))]


@pytest.mark.parametrize("name", INTO)
def test_a_run_starts_from_the_folder_under_any_topology(name, data, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path, name)
    places = [cell(place) for place in INTO[name].split()]
    curves = {}
    for place in places:
        curves[place.name] = run_ranks(place.world_size, train, _argv(data, folder, place))[0]
    _, micro_batches = run_ranks(1, _first_batch, _argv(data, folder, places[0]))[0]
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    losses = []
    with torch.no_grad():
        for batch in micro_batches:
            logits = reference(batch["tokens"]).logits
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
            losses.append((nll * batch["loss_mask"]).sum() / batch["loss_mask"].sum())
    assert len(losses) == 8
    for place in places:
        found = curves[place.name]
        assert found.losses[1] == pytest.approx(float(sum(losses) / 8), abs=TOLERANCE), place.name
        for step in (1, 2, 3):
            truth = curves[places[0].name]
            assert found.losses[step] == pytest.approx(truth.losses[step], abs=2e-5), place.name
            assert found.grad_norms[step] == pytest.approx(truth.grad_norms[step], rel=1e-4), place.name


def test_an_imported_folder_is_the_same_start(data, tmp_path):
    folder = saved(tmp_path, "llama 3")
    imported = convert(folder, tmp_path / "runs/imported").output
    place = cell("tp2pp1dp1-z1")
    direct = run_ranks(2, train, _argv(data, folder, place))[0]
    for argv in (_argv(data, imported, place), _argv(data, imported.parent, place)):
        assert run_ranks(2, train, argv)[0].digests == direct.digests
    # And a start that the folder is only the beginning of: when the run has saved, that is what goes on.
    flags = {"load": tmp_path / "run", "finetune": None, "pretrained_checkpoint": folder, "save": tmp_path / "run"}
    first = run_ranks(2, train, _argv(data, folder, place, **flags, save_interval=2, exit_interval=2))[0]
    second = run_ranks(1, train, _argv(data, folder, cell("tp1pp1dp1-z1"), **flags, save_interval=2))[0]
    assert sorted(first.losses) == [1, 2] and sorted(second.losses) == [3]
    assert second.losses[3] == pytest.approx(direct.losses[3], abs=2e-6)


def test_weights_alone_do_not_pass_for_a_checkpoint(data, tmp_path):
    folder = saved(tmp_path, "llama 3")
    with pytest.raises(RankFailure, match="give --finetune"):
        run_ranks(1, train, _argv(data, folder, cell("tp1pp1dp1-z1"), finetune=None))
    with pytest.raises(RankFailure, match=r"model\.ffn_hidden_size: 40 in the Source, 48 here"):
        run_ranks(1, train, _argv(data, folder, cell("tp1pp1dp1-z1"), ffn_hidden_size=48))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RankFailure, match="which --pretrained-checkpoint names"):
        run_ranks(1, train, command_line(data, pretrained_checkpoint=tmp_path / "empty"))


def test_every_family_is_looked_at():
    assert {THEIRS[name][0] for name in INTO} | set(OUT.values()) == set(FAMILIES) - {"mistral"}
    assert FAMILIES["mistral"].block == FAMILIES["llama"].block
