"""Tables of rotary positions against transformers', and ALiBi's rates against its BLOOM."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

from megatron.config.model import ModelConfig
from megatron.layers.alibi import alibi_slopes
from megatron.layers.rotary import Rotary, rotary_table

CPU = torch.device("cpu")
HEADS, HEAD_DIM, THETA = 4, 32, 500.0
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
CASES = {
    "default": (Rotary(HEAD_DIM, THETA), {"rope_type": "default"}),
    "linear": (Rotary(HEAD_DIM, THETA, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    # Theirs raises the base by ((factor * length / original length) - (factor - 1)) ^ (d / (d - 2)).
    "ntk": (Rotary(HEAD_DIM, THETA, "ntk", 4.0), {"rope_type": "dynamic", "factor": 1.0}),
    "llama3": (Rotary(HEAD_DIM, THETA, "llama3", 8.0, 1.0, 4.0, 64), LLAMA3),
}
SHORT, LONG = tuple(1 + i / 7 for i in range(HEAD_DIM // 2)), tuple(9 - i / 3 for i in range(HEAD_DIM // 2))


@functools.cache
def _theirs(name):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = CASES[name][1]
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, max_position_embeddings=64,
        rope_parameters={"rope_theta": THETA, **parameters},
    )  # fmt: skip
    if name == "default":
        return LlamaRotaryEmbedding(config).inv_freq, 1.0
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, CPU, 4 * 64 if name == "ntk" else None)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_transformers(name):
    frequencies, attention_factor = _theirs(name)
    assert attention_factor == 1.0
    torch.testing.assert_close(CASES[name][0].frequencies(64).float(), frequencies.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("length", [7, 16, 17, 40])
def test_long_rope_is_transformers_on_either_side_of_the_original_length(length):
    """Of a whole model's table: which factors are taken is decided in its forward."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "longrope", "rope_theta": THETA, "original_max_position_embeddings": 16, "factor": 4.0,
        "short_factor": list(SHORT), "long_factor": list(LONG),
    }  # fmt: skip
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, max_position_embeddings=64, rope_parameters=rope
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    scale = math.sqrt(1 + math.log(4) / math.log(16))
    rotary = Rotary(HEAD_DIM, THETA, "longrope", original_length=16, short_factors=SHORT, long_factors=LONG,
                    short_scale=scale, long_scale=scale)  # fmt: skip
    ours = rotary_table(rotary, 0, length, length, CPU)
    for table, theirs in zip(ours, (cos, sin), strict=True):
        torch.testing.assert_close(table, theirs[0, :, : HEAD_DIM // 2], rtol=0, atol=2e-5)
    other = rotary_table(rotary, 0, length, 17 if length <= 16 else 16, CPU)
    assert (other[0] - ours[0]).abs().max() > 0.1
    # A scale of its own on either side, which PhiMoE has.
    two = dataclasses.replace(rotary, short_scale=2 * scale, long_scale=3 * scale)
    times = 3 if length > 16 else 2
    torch.testing.assert_close(rotary_table(two, 0, length, length, CPU)[1], times * ours[1], rtol=1e-6, atol=0)


def test_scalings_differ_so_that_the_comparison_tells_them_apart():
    tables = [rotary.frequencies(64) for rotary, _ in CASES.values()]
    for index, table in enumerate(tables):
        for other in tables[index + 1 :]:
            assert (table / other - 1).abs().max() > 0.5


@pytest.mark.parametrize("name", CASES)
def test_a_chunks_table_is_its_part_of_the_whole(name):
    rotary = CASES[name][0]
    whole, chunk = rotary_table(rotary, 0, 24, 24, CPU), rotary_table(rotary, 16, 8, 24, CPU)
    for of_whole, of_chunk in zip(whole, chunk):
        assert of_whole.dtype == torch.float32 and of_whole.shape == (24, HEAD_DIM // 2)
        assert torch.equal(of_whole[16:], of_chunk)
    angles = torch.arange(24).double()[:, None] * rotary.frequencies(64)
    torch.testing.assert_close(whole[0], angles.cos().float(), rtol=0, atol=0)
    torch.testing.assert_close(whole[1], angles.sin().float(), rtol=0, atol=0)


def test_a_table_made_without_gradients_is_good_for_training():
    """It is kept, and evaluation may come first."""
    rotary = Rotary(8, 77.0)
    with torch.inference_mode():
        rotary_table(rotary, 0, 5, 5, CPU)
    x = torch.ones(5, 4, requires_grad=True)
    (x * rotary_table(rotary, 0, 5, 5, CPU)[0]).sum().backward()
    assert x.grad is not None


def test_of_a_model():
    model = ModelConfig(
        num_layers=1, hidden_size=96, num_attention_heads=2, seq_length=8, rotary_percent=0.25, rope_theta=7.0,
        rope_scaling_type="llama3", rope_scaling_factor=3.0, rope_low_freq_factor=1.5, rope_high_freq_factor=5.0,
        rope_original_max_position_embeddings=99,
    )  # fmt: skip
    assert Rotary.of(model) == Rotary(12, 7.0, "llama3", 3.0, 1.5, 5.0, 99)
    stretched = dataclasses.replace(
        model, rope_scaling_type="longrope", rope_short_factors=(1.0, 2.0), rope_long_factors=(3.0, 4.0),
        rope_short_mscale=1.1, rope_long_mscale=1.2,
    )  # fmt: skip
    assert Rotary.of(stretched) == Rotary(12, 7.0, "longrope", 3.0, 1.5, 5.0, 99, (1.0, 2.0), (3.0, 4.0), 1.1, 1.2)
    odd = ModelConfig(num_layers=1, hidden_size=60, num_attention_heads=4, seq_length=8, rotary_percent=0.5)
    assert Rotary.of(odd).rotary_dim == 6  # 7.5 of 15 features; pairs


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 20, 71])
def test_rates_are_blooms(num_heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 4), num_heads, torch.float32)  # [heads, 1, keys], rate x key position
    torch.testing.assert_close(alibi_slopes(num_heads), theirs[:, 0, 1], rtol=1e-6, atol=0)
