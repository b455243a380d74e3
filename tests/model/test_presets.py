"""Every preset against transformers' own model of that architecture, both on the meta device: no weights, no memory."""

from collections import defaultdict
from math import prod

import pytest
import torch
from model.huggingface_configs import CONFIGS, fields_of, huggingface_config
from model.huggingface_names import PARTS, TABLES, canonical, taken

from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.presets import PRESETS
from megatron.layers.router_ledger import RouterLedger
from megatron.model.build import build_model
from megatron.model.flops import num_parameters
from megatron.model.gpt import GPT
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams

TINY_VOCABULARY = 101
TOLERANCE = 5e-5
COUNTS = {
    "gpt-125m": 124_439_808,  # openai-community/gpt2
    "llama-3.1-8b": 8_030_261_248,
    "bloom-176b": 176_247_271_424,  # its model card
    "phi-3.5-moe-42b": 41_873_153_344,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "smollm2-135m": 134_515_008,
}
"""As published."""


def model_of(name, **changes):
    given = {} if "vocab_size" in PRESETS[name].values else {"vocab_size": TINY_VOCABULARY}
    return ModelConfig.of_preset(name, **(given | changes))


def on_meta(model):
    context = ParallelContext.single()
    with torch.device("meta"):
        return GPT(model, context, RandomStreams(1, context), ledger=RouterLedger())


def theirs(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(huggingface_config(name))


def differences(family, model, reference):
    """Names that the other has not, fused parameters that are not complete, shapes that are not equal."""
    ours = {name: param.atomic_layout.shape for name, param in on_meta(model).named_parameters()}
    found, parts = [], defaultdict(list)
    for name, param in reference.named_parameters():
        place = canonical(family, name)
        parts[place.name].append(place.part)
        if place.name in ours:
            shape = taken(torch.empty(ours[place.name], device="meta"), place, model).shape
            if shape != param.shape:
                found.append(f"{name} {tuple(param.shape)}: ours has {tuple(shape)}")
    found += [f"only one has {name}" for name in sorted(parts.keys() ^ ours.keys())]
    found += [f"{name} has parts {got}" for name, got in parts.items() if tuple(sorted(got)) not in PARTS]
    sizes = sum(param.numel() for param in reference.parameters()), sum(map(prod, ours.values()))
    if sizes[0] != sizes[1] or sizes[1] != num_parameters(model):
        found.append(f"parameters: theirs {sizes[0]}, ours {sizes[1]}, num_parameters {num_parameters(model)}")
    return found


def test_every_preset_and_every_family_is_looked_at():
    assert set(CONFIGS) == set(PRESETS) and len(PRESETS) >= 18
    assert {preset.family for preset in PRESETS.values()} == set(TABLES)
    assert all(CONFIGS[name]["model_type"] == preset.family for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", PRESETS)
def test_names_shapes_and_count(name):
    preset, model = PRESETS[name], model_of(name)
    assert differences(preset.family, model, theirs(name)) == []
    assert preset.num_parameters is None or preset.num_parameters == num_parameters(model)
    assert COUNTS.get(name, num_parameters(model)) == num_parameters(model)


def test_published_counts_are_looked_at():
    assert set(COUNTS) <= set(PRESETS)
    assert round(PRESETS["yulan-mini-2.4b"].num_parameters / 1e9, 2) == 2.42  # its README


def wrong_values(name, **changes):
    """What the preset says otherwise than config.json. Initial weights of YuLan-Mini need its multipliers."""
    model, published = model_of(name, **changes), fields_of(huggingface_config(name))
    if name == "yulan-mini-2.4b":
        del published["init_method_std"]
    return {field for field, value in published.items() if getattr(model, field) != value}


@pytest.mark.parametrize("name", PRESETS)
def test_values_are_the_published_ones(name):
    assert wrong_values(name) == set()
    unchecked = set(PRESETS[name].values) - set(fields_of(huggingface_config(name)))
    # The length of a sample is the run's; BLOOM's position limit is no number of its config.json.
    assert unchecked <= {"seq_length", "max_position_embeddings", "hidden_dropout", "attention_dropout"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt-125m", {"max_position_embeddings": 1025}),
        ("gpt-350m", {"num_layers": 23}),
        ("llama-3.1-8b", {"num_key_value_heads": 4}),
        ("llama-3.1-8b", {"ffn_hidden_size": 14335}),
        ("yulan-mini-2.4b", {"add_attention_bias": False}),
        ("bloom-176b", {"embed_layernorm": False}),
        ("bloom-176b", {"vocab_size": 250881}),
        ("qwen3-0.6b", {"kv_channels": 64}),
        ("qwen3-0.6b", {"untie_embeddings_and_output_weights": True}),
        ("mixtral-8x7b", {"num_experts": (16,)}),
        ("phi-3.5-moe-42b", {"add_output_layer_bias": False}),
        ("tiny-phi-moe", {"normalization": "rmsnorm"}),
    ],
)
def test_one_wrong_number_is_seen(name, changes):
    model = model_of(name, **changes)
    assert differences(PRESETS[name].family, model, theirs(name))
    assert wrong_values(name, **changes) == set(changes)


@pytest.mark.parametrize("field", ["rope_theta", "layernorm_epsilon", "rope_scaling_factor", "init_method_std"])
def test_one_wrong_number_that_no_shape_shows_is_seen(field):
    assert wrong_values("llama-3.1-8b", **{field: 0.5}) == {field}


def test_padding_is_in_shards_only():
    words = on_meta(model_of("gpt-125m")).embedding.word_embeddings.weight
    assert words.atomic_layout.shape == (50257, 768) and words.shape == (50304, 768)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny-")])
@torch.no_grad()
def test_a_tiny_one_computes_what_transformers_computes(name):
    """The table of names says more than shapes do: with the weights moved by it, logits are equal."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model, context = model_of(name, init_method_std=0.1), ParallelContext.single()
    parallel = ParallelConfig(no_pipeline_parallel=True)
    ours = build_model(model, parallel, context, RandomStreams(1, context), 1, ledger=RouterLedger()).eval()
    atoms = {}
    for key, param in ours.named_parameters():
        if param.dim() == 1:
            param.add_(torch.randn_like(param) / 10)  # Biases and norms away from 0 and 1.
        atoms[key] = param.atomic_layout.merge({param.shard_rank: param})
    reference = AutoModelForCausalLM.from_config(huggingface_config(name)).eval()
    for key, param in reference.named_parameters():
        place = canonical(PRESETS[name].family, key)
        param.copy_(taken(atoms[place.name], place, model))
    tokens = torch.randint(TINY_VOCABULARY, (2, 100))
    expected = reference(tokens).logits
    torch.testing.assert_close(ours.logits(tokens), expected, rtol=0, atol=TOLERANCE)
    # A fault that the comparison must see: the rows of one head are another's.
    fused = next(
        param
        for key, param in reference.named_parameters()
        if canonical(PRESETS[name].family, key).name == "layers.1.attention.query_key_value.weight"
    )
    fused.copy_(fused.roll(model.head_dim, 1 if name == "tiny-gpt" else 0))
    assert (reference(tokens).logits - expected).abs().max() > 100 * TOLERANCE
