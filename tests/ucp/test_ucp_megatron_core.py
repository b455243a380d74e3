"""Megatron-Core's torch_dist checkpoints, made by megatron-core itself (tests/ucp/megatron_core), are read right.

Three truths, none of them ours: the losses and gradient norms with which megatron-core went on after it had saved; the
tensors as torch's own reader of the format gives them; and the same training state saved in another of its formats.
"""

import dataclasses
import enum
import json
import math
import pickle
import sys
import types
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from ucp.plain_training import go_on
from ucp.samples import all_of, unpacked
from ucp.synthetic import make_state, model, write_native

from megatron.ucp import cli
from megatron.ucp.convert import convert
from megatron.ucp.diff import diff
from megatron.ucp.errors import (
    CorruptFileError,
    NotACheckpointError,
    UcpError,
    UnsafePickleError,
    UnsupportedCheckpointError,
)
from megatron.ucp.execute import read_into
from megatron.ucp.export import export
from megatron.ucp.naming.names import ROWS
from megatron.ucp.run_folder import find_checkpoints
from megatron.ucp.runs import whole_runs
from megatron.ucp.sources import find_checkpoint, open_source
from megatron.ucp.sources.dcp.metadata import SavedTensor
from megatron.ucp.sources.megatron import buckets, core
from megatron.ucp.sources.megatron.arguments import describe, schedule_of
from megatron.ucp.sources.megatron.common_file import read_common
from megatron.ucp.sources.megatron.tensors import _slices
from megatron.ucp.stored import FLOAT32
from megatron.ucp.topology import Topology

FP32 = (
    "gpt", "gpt_tp2", "gpt_exact_gelu", "gpt_dp2_buckets", "llama_tp2_dp2", "llama_tp2_dp2_buckets", "llama_pp2",
    "llama_pp2_buckets", "llama_by_layer", "llama_plain", "llama_qkv_bias", "moe_ep2",
    "moe_ep2_buckets", "moe_pp2_ep2_buckets",
)  # fmt: skip
BF16 = ("llama_pp2_dp2_bf16", "llama_bf16_many_buckets")
VOCABULARY, PADDED, SEQ, BATCH, STEPS = 29, 32, 8, 4, 3  # megatron_core/make.py
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """name -> its run folder."""
    return all_of("megatron_core", tmp_path_factory.mktemp("megatron_core"))


def opened(samples, name):
    """With the padding rows of the vocabulary, over which its softmax runs too; ours runs over the true ones."""
    return open_source(samples[name], vocab_size=PADDED)


@pytest.fixture
def copied(samples, tmp_path):
    """A sample's iteration folder that may be damaged."""

    def copy(name):
        return unpacked(f"megatron_core/{name}", tmp_path) / "iter_0000003"

    return copy


def state_of(source, name, state):
    info = source.manifest.parameters[name]
    out = torch.zeros(info.layout.numel)
    read_into(source, name, state, whole_runs(info.layout.numel), out)
    return out.view(info.layout.shape)


def batch(step):
    """megatron_core/make.py's."""
    return torch.randint(VOCABULARY, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(1000 + step % 2))


def gone_on(source, steps=3):
    """On megatron_core/make.py's batches."""
    rows = [batch(step) for step in range(STEPS, STEPS + steps)]
    return go_on(source, [(row[:, :-1], row[:, 1:]) for row in rows])


def theirs(samples, name):
    return json.loads((samples[name] / "losses.json").read_text())["after"]


def is_as_theirs(found, expected, tolerance=TOLERANCE):
    pairs = [(a, b) for pair in zip(found, expected, strict=True) for a, b in zip(*pair, strict=True)]
    assert len(pairs) == 6  # loss and norm of three steps
    return all(math.isclose(a, b, abs_tol=tolerance) for a, b in pairs)


@pytest.mark.parametrize("name", FP32)
def test_training_goes_on_as_megatron_core_went_on(samples, name):
    source = opened(samples, name)
    assert source.manifest.common["iteration"] == STEPS
    assert source.manifest.common["consumed_train_samples"] == STEPS * BATCH
    assert is_as_theirs(gone_on(source), theirs(samples, name))


@pytest.mark.parametrize("name", BF16)
def test_bf16_runs_bring_their_masters(samples, name):
    """Our model computes in fp32 what theirs did in bf16: their loss to its rounding, and the masters in full."""
    source = opened(samples, name)
    assert is_as_theirs(gone_on(source), theirs(samples, name), tolerance=5e-3)
    masters = torch.cat([state_of(source, name, "fp32").flatten() for name in source.manifest.parameters])
    assert (masters != masters.bfloat16().float()).float().mean() > 0.5
    assert {info.dtype for info in source.manifest.parameters.values()} == {"bfloat16"}


@pytest.mark.parametrize("name", ["llama_tp2_dp2", "llama_pp2", "moe_ep2"])
def test_two_of_its_formats_say_the_same_bitwise(samples, name):
    assert diff(samples[name], samples[f"{name}_buckets"]).is_equal


def by_hand(state):
    """The tensors that torch's reader gives, cut in plain torch: our name -> values."""

    def qkv(rows, groups=2, shared=2, head=4):
        by_group = rows.reshape(groups, (shared + 2) * head, *rows.shape[1:])
        q, k, v = by_group.split([shared * head, head, head], dim=1)
        return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in (q, k, v)])

    forms = {
        "input_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "attention.dense.weight": "self_attention.linear_proj.weight",
        "post_attention_norm.weight": "mlp.linear_fc1.layer_norm_weight",
        "mlp.dense_h_to_4h.weight": "mlp.linear_fc1.weight",
        "mlp.dense_4h_to_h.weight": "mlp.linear_fc2.weight",
    }
    found = {
        "embedding.word_embeddings.weight": state["embedding.word_embeddings.weight"][:VOCABULARY],
        "final_norm.weight": state["decoder.final_layernorm.weight"],
    }
    for layer in range(2):
        for ours, key in forms.items():
            found[f"layers.{layer}.{ours}"] = state[f"decoder.layers.{key}"][layer]
        found[f"layers.{layer}.attention.query_key_value.weight"] = qkv(
            state["decoder.layers.self_attention.linear_qkv.weight"][layer]
        )
    return found


@pytest.mark.parametrize("name", ["llama_tp2_dp2", "llama_pp2"])
def test_every_state_is_what_torchs_own_reader_gives_bitwise(samples, name):
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    folder = find_checkpoint(samples[name])
    content = {}
    _load_state_dict(content, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    content = {key: value for key, value in _flat(content).items() if isinstance(value, torch.Tensor)}
    source = open_source(folder)
    for state, prefix in (("fp32", "param."), ("exp_avg", "exp_avg."), ("exp_avg_sq", "exp_avg_sq.")):
        prefix = f"optimizer.state.{prefix}"
        there = by_hand({k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)})
        assert there.keys() == source.manifest.parameters.keys()
        for parameter, values in there.items():
            assert torch.equal(state_of(source, parameter, state), values), (parameter, state)


def _flat(value, name=""):
    """Nested dicts as torch's reader makes them of names with dots."""
    if not isinstance(value, dict):
        return {name: value}
    found = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def _exchanged(names, one, other):
    block = dict(names.block)
    block[one], block[other] = block[other], block[one]
    return dataclasses.replace(names, block=block)


def _with_block(names, ours, **changes):
    return dataclasses.replace(names, block={**names.block, ours: dataclasses.replace(names.block[ours], **changes)})


MISTAKES = {
    "rows of q, k, v by part": ("llama_pp2", lambda n: _with_block(n, "attention.query_key_value", form=ROWS)),
    "norms exchanged": ("llama_pp2", lambda n: _exchanged(n, "input_norm", "post_attention_norm")),
    "norms of q, k exchanged": ("llama_plain", lambda n: _exchanged(n, "attention.query_norm", "attention.key_norm")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_table_shows_in_the_losses(samples, monkeypatch, mistake):
    name, change = MISTAKES[mistake]
    monkeypatch.setattr(core, "CORE", change(core.CORE))
    assert not is_as_theirs(gone_on(opened(samples, name)), theirs(samples, name))


def test_another_gelu_shows_in_the_losses(copied, samples):
    folder = copied("gpt_exact_gelu")
    assert open_source(folder).manifest.model["exact_gelu"]
    edited(folder, of_args(bias_gelu_fusion=True))
    source = open_source(folder, vocab_size=PADDED)
    assert "exact_gelu" not in source.manifest.model
    assert not is_as_theirs(gone_on(source), theirs(samples, "gpt_exact_gelu"))


def test_only_the_fused_gelu_is_by_tanh():
    def is_exact(**values):
        args = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 29, "seq_length": 8}
        return describe({**args, **values}).model.exact_gelu

    assert not is_exact() and not is_exact(swiglu=True, bias_gelu_fusion=False)
    assert is_exact(bias_gelu_fusion=False) and is_exact(add_bias_linear=False)
    assert not is_exact(bias_gelu_fusion=False, openai_gelu=True)  # of Megatron-DeepSpeed's models


def test_a_mistake_in_moments_step_group_or_schedule_shows_in_the_losses(samples, monkeypatch):
    def changed(**of_all):
        source = opened(samples, "gpt")
        for key, info in source.manifest.parameters.items():
            source.manifest.parameters[key] = dataclasses.replace(info, **of_all)
        return source

    expected = theirs(samples, "gpt")
    assert not is_as_theirs(gone_on(changed(step=2.0)), expected)
    assert not is_as_theirs(gone_on(changed(group="decay")), expected)
    source = opened(samples, "gpt")
    source.manifest.common["schedule"]["warmup"] = 16
    assert not is_as_theirs(gone_on(source), expected)
    pieces = type(source).pieces

    def of_another_block(self, name, state):
        return pieces(self, name.replace("layers.0.", "layers.1.") if state == "exp_avg" else name, state)

    monkeypatch.setattr(type(source), "pieces", of_another_block)
    assert not is_as_theirs(gone_on(opened(samples, "gpt")), expected)


def test_buckets_of_another_order_are_refused(samples, monkeypatch):
    """Two of one size change places: every bucket ends where it ends, and the masters are not the weights."""
    order = list(buckets._NORM_FIRST)
    one, other = order.index("input_layernorm"), order.index("pre_mlp_layernorm")
    order[one], order[other] = order[other], order[one]
    monkeypatch.setattr(buckets, "_NORM_FIRST", tuple(order))
    with pytest.raises(CorruptFileError, match="masters of 4 parameter"):
        open_source(samples["llama_pp2_buckets"])


def test_an_order_that_does_not_fit_gives_way_to_the_next(samples, monkeypatch):
    """The two that are known change places."""
    first, inside = buckets._NORM_FIRST, buckets._NORM_INSIDE
    monkeypatch.setattr(buckets, "_NORM_FIRST", inside)
    with pytest.raises(UnsupportedCheckpointError, match="not understood"):
        monkeypatch.setattr(buckets, "_NORM_INSIDE", inside)
        open_source(samples["llama_pp2_buckets"])
    monkeypatch.setattr(buckets, "_NORM_INSIDE", first)
    assert diff(samples["llama_pp2"], samples["llama_pp2_buckets"]).is_equal


def test_experts_of_another_order_are_refused(samples, monkeypatch):
    """Experts that change places: every bucket ends where it ends, and the masters are not the weights."""
    right = buckets._expert_entries

    def exchanged(*given):
        entries = list(right(*given))
        for index in range(0, len(entries) - 3, 4):  # of two experts each a first and a second matrix
            one, other = entries[index], entries[index + 2]
            entries[index], entries[index + 2] = other, one
        return entries

    assert open_source(samples["moe_pp2_ep2_buckets"])
    monkeypatch.setattr(buckets, "_expert_entries", exchanged)
    with pytest.raises(CorruptFileError, match=r"masters of 2 parameter.*\n.*experts.linear_fc1"):
        open_source(samples["moe_pp2_ep2_buckets"])


def test_shifted_states_are_refused_by_name(samples):
    """megatron-core 0.16.1 wrote them so; its dp_reshardable save of the same run is right."""
    with pytest.raises(CorruptFileError, match="masters of 11 parameter") as error:
        open_source(samples["llama_shifted"])
    assert "decoder.layers.0.mlp.linear_fc1.weight" in error.value.found and "several buckets" in error.value.do


def test_converted_it_is_a_checkpoint_like_any_other(samples, tmp_path, capsys):
    run = samples["llama_tp2_dp2"]
    assert cli.main(["convert", str(run), str(tmp_path / "true")]) == 0
    assert diff(run, tmp_path / "true").is_equal
    convert_with_padding = ["convert", str(run), str(tmp_path / "universal"), "--vocab-size", str(PADDED)]
    assert cli.main(convert_with_padding) == 0
    assert cli.main(["verify", str(tmp_path / "universal")]) == 0
    assert is_as_theirs(gone_on(open_source(tmp_path / "universal")), theirs(samples, "llama_tp2_dp2"))
    exported = export(tmp_path / "universal", tmp_path / "hub", max_positions=SEQ)
    assert exported.family == "llama"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    rows = batch(STEPS)
    assert model(rows[:, :-1]).logits.shape == (BATCH, SEQ, PADDED)
    loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    assert math.isclose(loss.item(), theirs(samples, "llama_tp2_dp2")[0][0], abs_tol=TOLERANCE)
    export(run, tmp_path / "true hub", max_positions=SEQ)
    true = AutoModelForCausalLM.from_pretrained(tmp_path / "true hub", dtype=torch.float32)
    assert torch.equal(true(rows[:, :-1]).logits, model(rows[:, :-1]).logits[..., :VOCABULARY])
    capsys.readouterr()


def edited(folder, change):
    """Its common.pt changed."""
    content = torch.load(folder / "common.pt", weights_only=False)
    change(content)
    torch.save(content, folder / "common.pt")


def of_args(**values):
    return lambda content: vars(content["args"]).update(values)


def test_without_its_size_the_vocabulary_keeps_its_padding_or_gets_the_size_that_is_given(copied, tmp_path):
    folder = copied("gpt")
    edited(folder, of_args(vocab_size=None))
    rows = open_source(folder).manifest.parameters["embedding.word_embeddings.weight"].layout.shape[0]
    assert rows == 32
    assert cli.main(["convert", str(folder), str(tmp_path / "u"), "--vocab-size", str(VOCABULARY)]) == 0
    manifest = open_source(tmp_path / "u").manifest
    assert manifest.model["vocab_size"] == VOCABULARY
    assert manifest.parameters["embedding.word_embeddings.weight"].layout.shape[0] == VOCABULARY


REFUSED = {
    "another model": (of_args(multi_latent_attention=True, squared_relu=True), "2 reason"),
    "no sizes": (of_args(num_layers=None, hidden_size="16"), "args without num_layers, hidden_size"),
    "more blocks than there are": (of_args(num_layers=3), "its blocks first"),
    "another width": (of_args(ffn_hidden_size=65), "(64, 16), (65, 16) is expected"),
    "a vocabulary that is larger": (of_args(vocab_size=40), "(40, 16) is expected"),
    "untied": (of_args(untie_embeddings_and_output_weights=True), "output_layer.weight"),
    "no args": (lambda content: content.pop("args"), "has no args"),
    "no step": (lambda c: [g.pop("step") for g in c["optimizer"]["optimizer"]["param_groups"]], "not one number"),
    "two step counts": (
        lambda c: c["optimizer"]["optimizer"]["param_groups"][0].update(step=7.0), "not one number",
    ),
    "another form of the optimizer": (
        lambda c: c["content_metadata"].update(distrib_optim_sharding_type="fsdp_dtensor"), "a form that is not read",
    ),
    "numbers that are none": (of_args(norm_epsilon=float("nan")), "layernorm_epsilon"),
    "experts that are no number": (of_args(num_experts=[[4], [4]]), "experts in every"),
    "huge": (of_args(num_layers=10**12), "num_layers"),
    "tensors": (of_args(num_layers=torch.ones(3), swiglu=torch.ones(2), vocab_size=torch.ones(2)), "num_layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_ours_to_read_is_refused_whole(copied, tmp_path, case):
    change, told = REFUSED[case]
    folder = copied("gpt")
    edited(folder, change)
    with pytest.raises(UcpError, match="^") as error:
        convert(folder, tmp_path / "universal")
    assert told in str(error.value) and not (tmp_path / "universal").exists()


def test_buckets_of_experts_that_are_not_understood_are_refused(copied):
    folder = copied("moe_ep2_buckets")
    for change, told in (
        (of_args(expert_model_parallel_size=4), "2 rank(s) of experts, of tensor parallelism 1"),
        (of_args(expert_model_parallel_size=1, expert_tensor_parallel_size=2), "no order"),
        (of_args(num_experts=None), "buckets of 2 optimizer(s)"),
    ):
        edited(folder, change)
        with pytest.raises(UcpError, match="^") as error:
            open_source(folder)
        assert told in str(error.value), error.value
        edited(folder, of_args(expert_model_parallel_size=2, expert_tensor_parallel_size=1, num_experts=4))
    assert open_source(folder)


BUCKETS_REFUSED = {
    "of fewer ranks than said": (of_args(tensor_model_parallel_size=4), "buckets of 2 rank"),
    "of a virtual pipeline": (of_args(virtual_pipeline_model_parallel_size=2), "dealt evenly"),
    "of another model": (of_args(pipeline_model_parallel_size=2, tensor_model_parallel_size=1), "no order"),
}


@pytest.mark.parametrize("case", BUCKETS_REFUSED)
def test_buckets_that_are_not_understood_are_refused(copied, case):
    change, told = BUCKETS_REFUSED[case]
    folder = copied("llama_tp2_dp2_buckets")
    edited(folder, change)
    with pytest.raises(UnsupportedCheckpointError, match="not understood") as error:
        open_source(folder)
    assert any(told in line for line in error.value.found), error.value.found


class Evil:
    def __reduce__(self):
        return eval, ("open('/tmp/never','w')",)


def test_hostile_files_are_refused_and_run_nothing(copied, tmp_path):
    folder = copied("gpt")
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    torch.save({"args": Evil()}, folder / "common.pt")
    with pytest.raises(UnsafePickleError, match="allow-list"):
        open_source(folder)
    (folder / "common.pt").write_bytes(good["common.pt"])
    (folder / "metadata.json").write_text("{")
    with pytest.raises(CorruptFileError, match="JSON"):
        open_source(folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(UnsupportedCheckpointError, match="a format of Megatron-Core's") as error:
        open_source(folder)
    assert "zarr" in error.value.found
    (folder / "metadata.json").write_bytes(good["metadata.json"])
    (folder / "__0_0.distcp").write_bytes(good["__0_0.distcp"][:-5000])
    with pytest.raises(UcpError, match="torch.save|not whole"):
        convert(folder, tmp_path / "universal")
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CorruptFileError, match="not whole"):
        open_source(folder)
    assert not (tmp_path / "universal").exists()


def test_what_was_saved_here_comes_first_though_its_pointer_is_lost(copied):
    """A run of theirs goes on in its own folder: without `latest` it must not begin at theirs again."""
    run = copied("gpt").parent
    assert find_checkpoints(run).universal.folder.name == "iter_0000003"
    write_native(run / "global_step5", make_state(model(), seed=5), Topology(tp_size=2), 1)
    found = find_checkpoints(run)
    assert found.native.folder.name == "global_step5" and found.universal is None
    with pytest.raises(NotACheckpointError, match="not a checkpoint folder") as error:
        find_checkpoint(run)
    assert "global_step5" in error.value.do


def test_a_pointer_that_leads_nowhere_is_not_followed(samples, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for text in ("../../etc", "9" * 40, "", "7", "release"):
        (run / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(UcpError, match="not a checkpoint folder"):
            find_checkpoint(run)
    assert find_checkpoint(samples["gpt"]).name == "iter_0000003"


class PositionEmbeddingType(enum.Enum):
    """As BLOOM's fork has it; the file names it, and nothing imports it."""

    rotary = 1
    absolute = 2
    alibi = 3


@pytest.mark.parametrize(
    ("member", "positions"),
    [(PositionEmbeddingType.rotary, "rope"), (PositionEmbeddingType.absolute, "learned_absolute"),
     (PositionEmbeddingType.alibi, "alibi")],
)  # fmt: skip
def test_args_may_hold_what_only_their_program_knows(copied, member, positions):
    folder = copied("gpt")
    program = types.ModuleType("megatron_program")
    program.PositionEmbeddingType = PositionEmbeddingType
    PositionEmbeddingType.__module__ = "megatron_program"
    sys.modules["megatron_program"] = program
    try:
        edited(folder, of_args(position_embedding_type=member, seed=np.int64(3), data=np.zeros(3), path=Path("here")))
    finally:
        del sys.modules["megatron_program"]
    described = describe(vars(read_common(folder)["args"]))
    assert described.model.positions == positions


def test_without_an_optimizer_it_holds_weights(copied):
    folder = copied("llama_pp2_buckets")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for table in (metadata.state_dict_metadata, metadata.storage_data):
        for key in [key for key in table if getattr(key, "fqn", key).startswith("optimizer.")]:
            del table[key]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsupportedCheckpointError, match="not understood"):
        open_source(folder)  # which says that it has one
    edited(folder, lambda content: content.pop("optimizer"))
    source = open_source(folder)
    assert {info.states for info in source.manifest.parameters.values()} == {("fp32",)}
    assert source.manifest.saved_by == {"format": "Megatron-Core torch_dist"}


def test_a_schedule_over_tokens_is_not_taken_for_one_over_samples():
    state = {"max_lr": 1.0, "min_lr": 0.0, "lr_warmup_steps": 0, "num_steps": 4, "lr_decay_style": "cosine",
             "lr_decay_steps": 8, "start_wd": 0.1, "end_wd": 0.1, "wd_incr_style": "constant",
             "wd_incr_steps": 8}  # fmt: skip
    assert schedule_of(state, {})["decay"] == 8
    assert schedule_of({**state, "lr_decay_tokens": 10**9}, {}) is None
    assert schedule_of({**state, "lr_decay_style": "WSD"}, {}) is None
    assert schedule_of({**state, "max_lr": "1"}, {}) is None


def test_a_name_that_no_position_has_is_refused():
    described = describe({"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9,
                          "position_embedding_type": "relative"})  # fmt: skip
    assert described.model is None and any("'relative'" in fault for fault in described.faults)


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json"])
def test_changed_bytes_are_named_or_read(copied, name):
    folder = copied("llama_pp2_buckets")
    good, random = (folder / name).read_bytes(), Random(name)
    refused = 0
    for _ in range(100):
        bad = bytearray(good)
        for _ in range(random.choice((1, 1, 4))):
            bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
        (folder / name).write_bytes(bytes(bad[: random.randrange(len(bad))] if random.random() < 0.2 else bad))
        try:
            open_source(folder)
        except UcpError:
            refused += 1
    assert refused > 10


def test_names_of_modules_that_stand_apart_are_known():
    """Transformer Engine's block of experts, and what the local modules are called before they are saved."""
    saved = SavedTensor(FLOAT32, (2, 16), ())
    for there, name in {
        "decoder.layers.input_layernorm.weight": "input_layernorm.weight",
        "decoder.layers.pre_mlp_layernorm.bias": "pre_mlp_layernorm.bias",
        "module.decoder.layers.self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    }.items():
        assert [found for found, _ in _slices(there, there, saved, 9, 2)] == [
            f"decoder.layers.{layer}.{name}" for layer in range(2)
        ]
