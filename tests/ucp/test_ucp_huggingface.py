"""Model folders of Hugging Face's, in and out, against transformers: bits of the weights, and what they compute."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from ucp.huggingface_models import MODELS, VOCABULARY, made, ours, saved, tokens

from megatron.ucp import cli
from megatron.ucp.convert import convert
from megatron.ucp.diff import diff
from megatron.ucp.errors import (
    CorruptFileError,
    DigestMismatchError,
    MissingFileError,
    NotACheckpointError,
    OutputExistsError,
    UcpError,
    UnsafePathError,
    UnsafePickleError,
    UnsupportedCheckpointError,
)
from megatron.ucp.export import export
from megatron.ucp.huggingface.config_json import config_of, describe
from megatron.ucp.huggingface.families import FAMILIES
from megatron.ucp.huggingface.folder import ModelFolder
from megatron.ucp.naming.names import ROWS
from megatron.ucp.sources import open_source
from megatron.ucp.verify import verify

TOLERANCE = 2e-5


def weights(folder):
    return {name: values for path in sorted(folder.glob("*.safetensors")) for name, values in load_file(path).items()}


def assert_same_weights(one, other):
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name].tobytes() != right[name].tobytes()] == []


def theirs(folder, **options):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, attn_implementation="eager", **options
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(tokens()).logits


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_is_bitwise_and_transformers_reads_it(name, tmp_path):
    folder = saved(tmp_path, name)
    imported = convert(folder, tmp_path / "universal")
    result = export(imported.output, tmp_path / "out", max_shard_bytes=20_000)
    assert result.digest == imported.digest and result.family == MODELS[name][0]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_same_weights(folder, tmp_path / "out")
    export(folder, tmp_path / "direct")
    assert_same_weights(folder, tmp_path / "direct")
    expected = theirs(folder)
    assert torch.equal(theirs(tmp_path / "out"), expected)
    # And with a config.json of our own, as a checkpoint gets that was not imported.
    described = describe(json.loads((folder / "config.json").read_text()))
    config = config_of(described.family, described.model, "float32", 64)
    (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(theirs(folder), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_ours_computes_what_theirs_computes(name, tmp_path):
    folder = saved(tmp_path, name)
    torch.testing.assert_close(ours(open_source(folder), tokens()), theirs(folder), rtol=0, atol=TOLERANCE)


# -- mistakes in the table, each of which must be seen -----------------------------------------------------------------


def _with_block(family, ours, **changes):
    entry = dataclasses.replace(family.block[ours], **changes)
    return dataclasses.replace(family, block={**family.block, ours: entry})


def _exchanged(family, ours, *modules):
    return _with_block(family, ours, modules=modules)


QKV = "attention.query_key_value"
MISTAKES = {
    "the rows of a fused q, k, v are by part": ("bloom", lambda f: _with_block(f, QKV, form=ROWS)),
    "a square matrix is not transposed": ("gpt2", lambda f: _with_block(f, "attention.dense", form=ROWS)),
    "k and v exchanged": ("llama", lambda f: _exchanged(
        f, QKV, "self_attn.q_proj", "self_attn.v_proj", "self_attn.k_proj")),
    "k's and v's biases exchanged": ("qwen2", lambda f: _exchanged(
        f, QKV, "self_attn.q_proj", "self_attn.v_proj", "self_attn.k_proj")),
    "gate and up exchanged": ("llama", lambda f: _exchanged(f, "mlp.dense_h_to_4h", "mlp.up_proj", "mlp.gate_proj")),
    "experts' gate and up exchanged": ("mixtral", lambda f: _exchanged(
        f, "mlp.experts.dense_h_to_4h", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w1")),
    "the norms of queries and keys exchanged": ("qwen3", lambda f: dataclasses.replace(f, block={
        **f.block, "attention.query_norm": f.block["attention.key_norm"],
        "attention.key_norm": f.block["attention.query_norm"]})),
    "the norms of a block exchanged": ("llama", lambda f: dataclasses.replace(f, block={
        **f.block, "input_norm": f.block["post_attention_norm"], "post_attention_norm": f.block["input_norm"]})),
    "another base of the rotary frequencies": ("llama", lambda f: dataclasses.replace(
        f, keys={**f.keys, "rope_theta": "hidden_size"})),
    "another epsilon of the norms": ("llama", lambda f: dataclasses.replace(
        f, keys={**f.keys, "layernorm_epsilon": "initializer_range"})),
    "a softmax for SparseMixer": ("phimoe", lambda f: dataclasses.replace(
        f, fixed={**f.fixed, "moe_router_score_function": "softmax"})),
    "another threshold of SparseMixer": ("phimoe", lambda f: dataclasses.replace(
        f, keys={**f.keys, "moe_sparsemixer_eps": "initializer_range"})),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_table_is_seen(mistake, tmp_path, monkeypatch):
    from megatron.ucp.huggingface import config_json

    name, plant = MISTAKES[mistake]
    folder = saved(tmp_path, name)
    if "rotary" in mistake:
        monkeypatch.setattr(config_json._Reading, "_rope", lambda self: {"rope_theta": 33.0})
    planted = plant(FAMILIES[MODELS[name][0]])
    monkeypatch.setattr(config_json, "FAMILIES", {**FAMILIES, MODELS[name][0]: planted})
    logits = ours(open_source(folder), tokens())
    assert (logits - theirs(folder)).abs().max() > 50 * TOLERANCE


def test_rotary_pairs_are_halves_not_neighbours(tmp_path):
    """Rows as Meta's own files of LLaMA have them: read as they are, they would compute something else."""
    model = made("llama")
    expected = model(tokens()).logits
    with torch.no_grad():
        for key, param in model.named_parameters():
            if ".q_proj." in key or ".k_proj." in key:
                param.copy_(param.view(-1, 2, 4, 32).transpose(1, 2).reshape(param.shape))
    model.save_pretrained(tmp_path / "meta")
    assert (ours(open_source(tmp_path / "meta"), tokens()) - expected).abs().max() > 50 * TOLERANCE


# -- forms of a folder -------------------------------------------------------------------------------------------------


def test_parts_half_precisions_and_bin(tmp_path):
    from transformers import AutoConfig

    folder = saved(tmp_path, "qwen3")
    expected = verify(folder).digest
    made("qwen3").save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*"))) > 3
    assert verify(tmp_path / "parts").digest == expected
    states = made("qwen3").state_dict()
    for kind in ("one", "two"):
        (tmp_path / kind).mkdir()
        shutil.copyfile(folder / "config.json", tmp_path / kind / "config.json")
    torch.save(states, tmp_path / "one/pytorch_model.bin")
    assert verify(tmp_path / "one").digest == expected
    halves = list(states.items())[: len(states) // 2], list(states.items())[len(states) // 2 :]
    names = {}
    for number, half in enumerate(halves, start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(dict(half), tmp_path / "two" / file)
        names |= {key: file for key, _ in half}
    (tmp_path / "two/pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert verify(tmp_path / "two").digest == expected
    for dtype in (torch.bfloat16, torch.float16):
        path = tmp_path / str(dtype)
        made("qwen3").to(dtype).save_pretrained(path)
        export(path, tmp_path / f"again {dtype}")
        assert_same_weights_by_torch(path, tmp_path / f"again {dtype}")
        assert AutoConfig.from_pretrained(tmp_path / f"again {dtype}").dtype == dtype
        # fp32 in between keeps every bit of them.
        convert(path, tmp_path / f"universal {dtype}")
        export(tmp_path / f"universal {dtype}", tmp_path / f"once more {dtype}", dtype=str(dtype)[6:])
        assert_same_weights_by_torch(path, tmp_path / f"once more {dtype}")


def assert_same_weights_by_torch(one, other):
    from safetensors.torch import load_file as load

    left, right = load(one / "model.safetensors"), load(other / "model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_names_without_their_prefix_and_masks_of_old_files(name, tmp_path):
    folder = saved(tmp_path, name)
    old = {key.removeprefix("transformer."): torch.from_numpy(value) for key, value in weights(folder).items()}
    old["h.0.attn.bias"], old["h.0.attn.masked_bias"] = torch.ones(1, 1, 8, 8), torch.tensor(-1e4)
    (tmp_path / "old").mkdir()
    shutil.copyfile(folder / "config.json", tmp_path / "old/config.json")
    torch.save(old, tmp_path / "old/pytorch_model.bin")
    assert verify(tmp_path / "old").digest == verify(folder).digest


def test_of_sequences_beyond_the_original_length(tmp_path):
    """longrope has other factors for them. transformers' PhiMoE chooses the scale by the length and keeps the short
    factors; the published model (and vLLM) takes the long ones, as transformers' other models do."""
    long = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))
    folder = saved(tmp_path, "llama longrope")
    with torch.no_grad():
        expected = made("llama longrope")(long).logits
        assert (made("llama longrope", max_position_embeddings=512)(long).logits - expected).abs().max() > 1e-2
    torch.testing.assert_close(ours(open_source(folder), long), expected, rtol=0, atol=TOLERANCE)
    rope = MODELS["phimoe longrope"][1]["rope_parameters"]
    kept = made("phimoe longrope", rope_parameters={**rope, "long_factor": rope["short_factor"]})
    folder = tmp_path / "phimoe_with_one_set_of_factors"
    kept.save_pretrained(folder)
    with torch.no_grad():
        expected = kept(long).logits
    torch.testing.assert_close(ours(open_source(folder), long), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "phimoe"])
def test_experts_in_one_tensor(name, tmp_path):
    """As transformers 5 has them in memory, and a state_dict written by hand has them too."""
    folder = saved(tmp_path, name)
    (tmp_path / "whole").mkdir()
    shutil.copyfile(folder / "config.json", tmp_path / "whole/config.json")
    states = made(name).state_dict()
    assert any(key.endswith("experts.gate_up_proj") for key in states)
    torch.save(states, tmp_path / "whole/pytorch_model.bin")
    assert verify(tmp_path / "whole").digest == verify(folder).digest


def test_a_tied_weight_that_is_written_twice(tmp_path):
    folder = saved(tmp_path, "llama tied")
    states = {key: torch.from_numpy(value) for key, value in weights(folder).items()}
    twice = tmp_path / "twice"
    twice.mkdir()
    shutil.copyfile(folder / "config.json", twice / "config.json")
    states["lm_head.weight"] = states["model.embed_tokens.weight"].clone()
    torch.save(states, twice / "pytorch_model.bin")
    assert verify(twice).digest == verify(folder).digest
    states["lm_head.weight"][5, 5] += 1
    torch.save(states, twice / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpointError, match='"tie_word_embeddings": false'):
        open_source(twice)


def test_the_cache_of_the_hub(tmp_path):
    """Files of a snapshot are links into its blobs; every other link is refused."""
    folder = saved(tmp_path, "llama")
    (folder / "tokenizer.json").write_text("{}")
    blobs, snapshot = tmp_path / "models--x--y/blobs", tmp_path / "models--x--y/snapshots/0123abc"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    result = convert(snapshot, tmp_path / "universal")
    assert result.digest == verify(folder).digest
    assert (tmp_path / "universal/tokenizer.json").read_text() == "{}" and verify(tmp_path / "universal").is_sound
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(CorruptFileError, match="a link where a file"):
        open_source(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/../../llama/config.json")
    with pytest.raises(UnsafePathError, match="a link where a file"):
        open_source(snapshot)


def test_what_comes_with_a_model_comes_along(tmp_path):
    folder = saved(tmp_path, "llama")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    generation = (folder / "generation_config.json").read_text()
    convert(folder, tmp_path / "universal")
    export(tmp_path / "universal", tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "out/generation_config.json").read_text() == generation
    kept = json.loads((folder / "config.json").read_text())
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: value for key, value in kept.items() if key != "dtype"} == {
        key: value for key, value in written.items() if key != "torch_dtype"
    }


def test_like_another_models_folder_is_refused_with_all_differences(tmp_path):
    folder, other = saved(tmp_path, "llama"), saved(tmp_path, "llama 3")
    with pytest.raises(UnsupportedCheckpointError, match="kv_channels") as error:
        export(folder, tmp_path / "out", like=other)
    assert "rope_scaling_type" in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedCheckpointError, match="two families"):
        export(folder, tmp_path / "out", family="mistral")
    (folder / "config.json").rename(tmp_path / "config.json")


# -- commands ----------------------------------------------------------------------------------------------------------


def test_commands(tmp_path, capsys):
    folder = saved(tmp_path, "llama")
    universal, out = tmp_path / "u", tmp_path / "o"
    assert cli.main(["import", str(folder), str(universal)]) == 0
    assert "--finetune" in capsys.readouterr().out
    assert cli.main(["export", str(universal), str(out), "--dtype", "bfloat16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["family"] == "llama" and told["dtype"] == "bfloat16" and told["tensors"] == len(weights_of(out))
    assert cli.main(["export", str(universal), str(out)]) == 1
    assert "already there" in capsys.readouterr().err
    assert cli.main(["import", str(universal / "zero"), str(tmp_path / "x")]) == 2
    for command in ("inspect", "verify", "plan"):
        assert cli.main([command, str(folder)]) == 0
    assert cli.main(["diff", str(folder), str(universal)]) == 0
    assert not diff(folder, out).is_equal  # bf16 is another state
    capsys.readouterr()


def weights_of(folder):
    return ModelFolder.open(folder).tensors


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_written(tmp_path):
    folder = saved(tmp_path, "llama")
    states = {key: torch.from_numpy(value) for key, value in weights(folder).items()}
    del states["model.norm.weight"]
    states["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    states["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 32, dtype=torch.int8)
    states["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(32)
    (folder / "model.safetensors").unlink()
    torch.save(states, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpointError, match="4 reason") as error:
        convert(folder, tmp_path / "universal")
    text = str(error.value)
    for part in ("model.norm.weight", "(3, 3), (40, 32) is expected", "is int8", "self_attn.q_proj.bias"):
        assert part in text
    assert not (tmp_path / "universal").exists()


def _index(table):
    def plant(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))

    return plant


def _pickle(folder):
    import pickle

    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (print, ("it ran",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}))


def _config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def _cut(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-100])


HOSTILE = {
    "an index that leaves the folder": (_index({"model.norm.weight": "../../etc/passwd"}), UnsafePathError),
    "an absolute name in an index": (_index({"model.norm.weight": "/etc/passwd"}), UnsafePathError),
    "an index of no files": (_index({}), CorruptFileError),
    "an index whose names are numbers": (_index({"model.norm.weight": 7}), UnsafePathError),
    "an index of a file that is not there": (_index({"model.norm.weight": "model-9.safetensors"}), MissingFileError),
    "a pickle that runs": (_pickle, (CorruptFileError, UnsafePickleError)),
    "a config that is a list": (_config("[1]"), CorruptFileError),
    "a config that is not JSON": (_config("{"), CorruptFileError),
    "a config nested too deep": (_config('{"a":' * 5000 + "1" + "}" * 5000), CorruptFileError),
    "a file that was cut short": (_cut, CorruptFileError),
    "a model of a billion heads": (_config(json.dumps({
        "model_type": "bloom", "n_layer": 2, "hidden_size": 1 << 31, "n_head": 1 << 31, "vocab_size": 101})),
        UnsupportedCheckpointError),
    "a model of a million blocks": (_config(json.dumps({
        "model_type": "llama", "num_hidden_layers": 4096, "hidden_size": 1 << 31, "num_attention_heads": 1 << 30,
        "vocab_size": 1 << 31, "intermediate_size": 1 << 31})), UnsupportedCheckpointError),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_folders_are_refused_by_name(what, tmp_path, capsys):
    plant, error = HOSTILE[what]
    folder = saved(tmp_path, "llama")
    plant(folder)
    with pytest.raises(error, match="."):
        open_source(folder)
    with pytest.raises(UcpError, match="."):
        convert(folder, tmp_path / "universal")
    assert not (tmp_path / "universal").exists() and "it ran" not in capsys.readouterr().out


def test_a_folder_without_weights_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotACheckpointError, match="not a checkpoint folder"):
        open_source(tmp_path)


def test_an_export_is_held_against_what_was_saved(tmp_path):
    folder = saved(tmp_path, "llama")
    universal = convert(folder, tmp_path / "universal").output
    path = universal / "zero/layers.1.mlp.dense_h_to_4h.weight/fp32.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DigestMismatchError, match=r"layers\.1\.mlp\.dense_h_to_4h\.weight"):
        export(universal, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.*"))


def test_nothing_is_overwritten_and_no_folder_lies_in_the_other(tmp_path):
    folder = saved(tmp_path, "llama")
    (tmp_path / "out").mkdir()
    for output in (tmp_path / "out", folder, folder / "out"):
        with pytest.raises(OutputExistsError, match="."):
            export(folder, output)


def test_a_thread_keeps_one_transposed_tensor(tmp_path):
    source = open_source(saved(tmp_path, "gpt2"))
    piece = source.pieces("layers.0.attention.query_key_value.weight", "fp32")[0]
    first = source.tensor(piece)
    assert source.tensor(piece) is first
    source.tensor(source.pieces("layers.1.attention.query_key_value.weight", "fp32")[0])
    assert source.tensor(piece) is not first
    assert np.array_equal(source.tensor(piece).array(), first.array())
