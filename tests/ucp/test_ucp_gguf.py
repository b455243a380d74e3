"""A .gguf of a tiny LLaMA, written with the library gguf from known weights, is the model that they came from."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from ucp.huggingface_models import MODELS, saved

from megatron.ucp import cli
from megatron.ucp.diff import diff
from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.huggingface.gguf import unpacked
from megatron.ucp.sources import open_source

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _permuted(weight, heads):
    """As llama.cpp wants the rows of q and k: neighbours in the place of halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write(path, weights, is_permuted=True):
    from gguf import GGUFWriter

    values = MODELS["llama"][1]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(values["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"t{i}" for i in range(4, values["vocab_size"] + 1))])
    writer.add_token_merges(["t 1"])
    writer.add_token_types([1] * values["vocab_size"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        block = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            block = f"blk.{layer}."
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
        if heads and is_permuted:
            weight = _permuted(weight, heads)
        writer.add_tensor(f"{block}{NAMES[module]}.{kind}", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_it_is_the_model_that_the_weights_came_from(tmp_path, capsys):
    folder = saved(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    _write(tmp_path / "m.gguf", weights)
    assert cli.main(["import", str(tmp_path / "m.gguf"), str(tmp_path / "out/imported")]) == 0
    assert "m.gguf -> " in capsys.readouterr().out
    found = diff(tmp_path / "out/imported", folder)
    assert found.is_equal, found
    # The norm's epsilon is kept in fp32 there, and means 1e-6.
    manifest = open_source(tmp_path / "out/imported").manifest
    assert manifest.model == open_source(folder).manifest.model and manifest.model["layernorm_epsilon"] == 1e-6
    config = json.loads((tmp_path / "out/imported/config.json").read_text())
    assert "quantization_config" not in config
    assert (tmp_path / "out/imported/tokenizer.json").is_file()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"imported", "latest_universal"}
    # Planted: rows as Hugging Face has them would be another model.
    _write(tmp_path / "wrong.gguf", weights, is_permuted=False)
    assert cli.main(["import", str(tmp_path / "wrong.gguf"), str(tmp_path / "out/wrong")]) == 0
    assert not diff(tmp_path / "out/wrong", folder).is_equal


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 64])
def test_no_gguf(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UnsupportedCheckpointError, match="transformers cannot read this file"):
        with unpacked(tmp_path / "m.gguf", near=tmp_path / "out/u"):
            pass
    assert list((tmp_path / "out").iterdir()) == []
