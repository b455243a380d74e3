"""What a model is in our words and in Hugging Face's: layouts against the layers', configurations against
transformers'."""

import dataclasses
import math

import pytest
import torch
from model.huggingface_configs import CONFIGS, huggingface_config
from model.tiny_gpt import FAMILIES as TINY
from model.tiny_gpt import config as tiny_config

from megatron.config.checkpoint_args import model_values
from megatron.config.model import ModelConfig
from megatron.config.presets import PRESETS
from megatron.layers.router_ledger import RouterLedger
from megatron.model.build import parameter_groups, parameter_layouts
from megatron.model.flops import num_parameters
from megatron.model.gpt import GPT
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams
from megatron.training.build import _identity
from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.huggingface.config_json import config_of, describe, family_of, mismatches
from megatron.ucp.huggingface.families import FAMILIES
from megatron.ucp.naming.gpt_model import GptModel, group_of, layouts, sound_settings
from megatron.ucp.naming.tensors import pairs

MODELS = {
    **{name: ModelConfig.of_preset(name, **({} if "vocab_size" in p.values else {"vocab_size": 101}))
       for name, p in PRESETS.items()},
    **{f"tiny {name}": tiny_config(**values) for name, values in TINY.items()},
    "tiny GPT": tiny_config(),
    "tiny GPT, experts with biases": tiny_config(num_experts=(4,), expert_interval=2, moe_ffn_hidden_size=24),
    "tiny LLaMA with adapters": tiny_config(
        **TINY["LLaMA"], lora_rank=3, lora_target_modules=("q_proj", "v_proj", "down_proj")
    ),
    "tiny GPT with adapters": tiny_config(lora_rank=3, lora_fused=True),
    "tiny GPT with experts and adapters": tiny_config(
        num_experts=(4,), expert_interval=2, moe_ffn_hidden_size=24, lora_rank=2
    ),
    "tiny LLaMA, fused adapters": tiny_config(**TINY["LLaMA"], lora_rank=2, lora_fused=True),
    "tiny LLaMA with biases of q, k, v": tiny_config(**TINY["LLaMA"], add_qkv_bias=True),
}  # fmt: skip


def declared(model):
    """By the layers themselves, without the vocabulary's padding."""
    context = ParallelContext.single()
    with torch.device("meta"):
        made = GPT(model, context, RandomStreams(1, context), ledger=RouterLedger())
    return {name: layout.without_padding() for name, layout in parameter_layouts(made).items()}


@pytest.mark.parametrize("name", MODELS)
def test_layouts_are_those_that_the_layers_declare(name):
    model = GptModel.of(_identity(MODELS[name]))
    ours = layouts(model)
    # Cuts of a padded vocabulary lose their unit with the padding: what is left must be equal in every part.
    assert {key: layout.without_padding() for key, layout in ours.items()} == declared(MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_those_that_a_run_makes(name):
    context = ParallelContext.single()
    with torch.device("meta"):
        made = GPT(MODELS[name], context, RandomStreams(1, context), ledger=RouterLedger())
    names = {id(param): key for key, param in made.named_parameters()}
    groups = parameter_groups(made, weight_decay=0.1)
    expected = {names[id(param)]: group["name"] for group in groups for param in group["params"]}
    ours = layouts(GptModel.of(_identity(MODELS[name])))
    assert {key: group_of(key, layout.shape) for key, layout in ours.items()} == expected


@pytest.mark.parametrize("name", MODELS)
def test_what_a_run_writes_is_read_and_written_again(name):
    identity = _identity(MODELS[name])
    model = GptModel.of(identity)
    assert model.to_json() == identity and not model.faults()
    # And --use-checkpoint-args makes the same run of it.
    again = ModelConfig(seq_length=16, **model_values(model, "here"))
    assert _identity(again) == identity


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": -1}, "num_layers"),
        ({"num_layers": 1 << 20}, "num_layers"),
        ({"positions": "sinusoidal"}, "positions"),
        ({"swiglu": 1}, "swiglu"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_a_description_that_cannot_be_is_refused(change, named):
    with pytest.raises(UnsupportedCheckpointError, match=named):
        GptModel.of({**_identity(MODELS["tiny GPT"]), **change})


def test_a_description_that_lacks_everything_says_so():
    with pytest.raises(UnsupportedCheckpointError, match="vocab_size: is missing"):
        GptModel.of({})


def published(name):
    return huggingface_config(name).to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_the_preset(name):
    described = describe(published(name))
    assert not described.faults
    assert described.model.to_json() == _identity(MODELS[name])
    assert described.family.model_type == PRESETS[name].family == family_of(described.model).model_type
    assert sum(math.prod(pair.shape) for pair in pairs(described.family, described.model)) == num_parameters(
        MODELS[name]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_transformers_reads_as_the_published_one(name):
    """Every value of transformers' own configuration that decides the function, compared through its classes."""
    from transformers import AutoConfig

    described = describe(published(name))
    length = described.settings.get("max_position_embeddings", 77)
    written = config_of(described.family, described.model, "float32", length)
    theirs, ours = published(name), AutoConfig.for_model(written.pop("model_type"), **written).to_dict()
    free = {
        "architectures", "dtype", "torch_dtype", "initializer_range", "attention_dropout", "hidden_dropout",
        "attn_pdrop", "resid_pdrop", "embd_pdrop", "router_aux_loss_coef", "transformers_version", "_name_or_path",
        "router_jitter_noise", "layer_types", "max_window_layers",
    }  # fmt: skip
    same = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}

    def decisive(values):
        kept = {key: value for key, value in values.items() if key not in free}
        # Sizes that are derived where they are not given.
        derived = {"n_inner": 4 * described.model.hidden_size, "head_dim": described.model.kv_channels}
        kept |= {key: value for key, value in derived.items() if key in kept and kept[key] is None}
        return {key: same.get(value, value) if isinstance(value, str) else value for key, value in kept.items()}

    assert decisive(ours) == decisive(theirs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_config_leaves_out_is_as_transformers_has_it(model_type):
    from transformers import AutoConfig

    whole = AutoConfig.for_model(model_type).to_dict()
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "n_layer", "n_head", "n_embd")
    shape += ("intermediate_size", "vocab_size")
    least = {key: whole[key] for key in ("model_type", *shape) if key in whole}
    bare, full = describe(least), describe(whole)
    assert not bare.faults and bare.model == full.model
    assert bare.settings.get("max_position_embeddings") == full.settings.get("max_position_embeddings")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_wrong_default_would_be_seen(model_type):
    """The comparison above, planted: each default, changed, changes the model or is a fault."""
    family = FAMILIES[model_type]
    from transformers import AutoConfig

    whole = AutoConfig.for_model(model_type).to_dict()
    shape = {key: whole[key] for key in ("hidden_size", "num_hidden_layers", "n_layer", "n_embd") if key in whole}
    heads = {
        key: whole[key] for key in ("num_attention_heads", "n_head", "vocab_size", "intermediate_size") if key in whole
    }
    base = {"model_type": model_type, **shape, **heads}
    seen = 0
    for key, default in family.defaults.items():
        if key in base or key in ("max_position_embeddings", "resid_pdrop", "attn_pdrop"):
            continue
        other = not default if isinstance(default, bool) else "relu" if isinstance(default, str) else 1
        if isinstance(default, list):
            other = [0]
        before, after = describe(base), describe({**base, key: other})
        differs = before.model != after.model or before.faults != after.faults or before.notes != after.notes
        assert differs or key in ("decoder_sparse_step", "head_dim"), key
        seen += 1
    assert seen >= 2


_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
         "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        ("tiny-llama", {"model_type": "mamba"}, "model_type 'mamba'"),
        ("tiny-llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("tiny-llama", {"mlp_bias": True}, "mlp_bias without attention_bias"),
        ("tiny-llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ("tiny-llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1]}}, "without long_factor"),
        ("tiny-llama", {"rope_parameters": {**_LONG, "short_factor": [1.0] * 7}}, "rope_short_factors: 7 from 1 up"),
        ("tiny-llama", {"rope_parameters": {**_LONG, "long_factor": [0.0] * 8}}, "8 from 0 up, not 8 above 0"),
        ("tiny-llama", {"rope_parameters": {**_LONG, "long_factor": 3}}, "rope_long_factors: 3 is no list"),
        ("tiny-llama", {"rope_parameters": {**_LONG, "short_mscale": 1.2}}, "with short_mscale"),
        ("tiny-llama", {"rope_parameters": _LONG, "max_position_embeddings": "x"}, "stretched to 'x'"),
        ("tiny-phi-moe", {"rope_parameters": _LONG}, "without long_mscale, short_mscale"),
        ("tiny-phi-moe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear has no name"),
        ("tiny-phi-moe", {"num_experts_per_tok": 3}, "num_experts_per_tok 3: only 2"),
        ("tiny-phi-moe", {"router_jitter_noise": 2}, "moe_sparsemixer_eps"),
        ("tiny-llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "without high_freq"),
        ("tiny-llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "mscale": 2}}, "with mscale"),
        ("tiny-llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set of values"),
        ("tiny-llama", {"quantization_config": {"bits": 4}}, "quantised"),
        ("tiny-llama", {"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
        ("tiny-llama", {"num_key_value_heads": 3}, "cannot share 3 keys"),
        ("tiny-llama", {"hidden_size": 66, "head_dim": None}, "not a multiple of 4 heads"),
        ("tiny-llama", {"num_hidden_layers": 10**9}, "num_layers"),
        ("tiny-llama", {"vocab_size": None}, "vocab_size"),
        ("tiny-llama", {"rms_norm_eps": "nan"}, "layernorm_epsilon"),
        ("tiny-qwen3", {"use_sliding_window": True}, "use_sliding_window True"),
        ("tiny-gpt", {"activation_function": "relu"}, "activation_function 'relu'"),
        ("tiny-gpt", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("tiny-bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
        ("tiny-neox", {"hidden_act": ["gelu"]}, "hidden_act ['gelu']"),
        ("tiny-moe", {"num_local_experts": 1}, "no mixture"),
        ("tiny-moe", {"num_local_experts": "many"}, "no numbers"),
        ("tiny-moe", {"num_experts_per_tok": 9}, "9 experts a token"),
        ("tiny-moe", {"num_experts_per_tok": 1}, "divided by itself"),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_named(base, change, named):
    described = describe({**published(base), **change})
    assert described.model is None
    assert any(named in fault for fault in described.faults), described.faults


def test_all_faults_are_told_at_once():
    described = describe({**published("tiny-llama"), "hidden_act": "relu", "quantization_config": {"bits": 4},
                          "mlp_bias": True, "rope_parameters": {"rope_type": "yarn"}})  # fmt: skip
    assert len(described.faults) == 4


def test_a_sliding_window_is_noted():
    mistral = {**published("tiny-llama"), "model_type": "mistral", "sliding_window": 64}
    assert "64" in describe(mistral).notes[0] and describe(mistral).model
    assert not describe({**mistral, "sliding_window": None}).notes


def test_dense_blocks_of_a_mixture_are_known_one_by_one():
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0, 2]
    ).to_dict()
    model = describe(config).model
    assert model.num_experts == (1, 4, 1, 4)
    assert describe(config_of(FAMILIES["qwen3_moe"], model, "float32", 16)).model == model
    assert model_values(model, "here")["expert_interval"] == 2


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("tiny GLM-4.5", {}, "moe_router_score_function"),
        ("tiny GPT", {"qk_layernorm": True}, "qk_layernorm"),
        ("tiny GPT", {"add_bias_linear": False}, "biases"),
        ("tiny LLaMA", {"rotary_percent": 0.5}, "of a head is rotated"),
        ("tiny LLaMA", {"rope_scaling_type": "ntk"}, "rope scaling ntk"),
        ("tiny Mixtral", {"moe_router_score_function": "sparsemixer"}, "moe_router_score_function"),
        ("tiny BLOOM", {"ffn_hidden_size": 100}, "not 4 x hidden"),
        ("tiny Mixtral", {"num_experts": (4, 8, 4)}, "not all the same number"),
    ],
)
def test_a_model_without_a_name_there_is_refused_with_the_reasons(name, changes, named):
    model = GptModel.of(_identity(dataclasses.replace(MODELS[name], **changes)))
    with pytest.raises(UnsupportedCheckpointError, match=named):
        family_of(model)
    assert all(mismatches(family, model) for family in FAMILIES.values())


def test_settings_that_cannot_be_are_left_out():
    values = {
        "hidden_dropout": 2.0,
        "attention_dropout": 0.1,
        "seq_length": "x",
        "moe_token_dropping": True,
        "other": 1,
    }
    assert sound_settings(values) == {"attention_dropout": 0.1, "moe_token_dropping": True}
    assert sound_settings(None) == {} == sound_settings([1])


STRANGE = [None, True, -1, 0, 1, 3, 1 << 70, 1e400, float("nan"), 0.5, "", "7", [], [1], {}, {"rope_type": []}, [[]]]


@pytest.mark.parametrize("base", [name for name in CONFIGS if name.startswith("tiny-")])
def test_no_value_of_a_config_makes_anything_but_a_model_or_faults(base):
    """Each key, and keys that it does not have, with values of every kind."""
    config = published(base)
    keys = {
        *config,
        "rope_scaling",
        "rope_theta",
        "rotary_pct",
        "num_experts",
        "mlp_only_layers",
        "head_dim",
        "mlp_bias",
    }
    for key in sorted(keys):
        for value in STRANGE:
            described = describe({**config, key: value})
            assert (described.model is None) == bool(described.faults), (key, value)
            if described.model is not None and described.family is not None:
                assert pairs(described.family, described.model) and not mismatches(described.family, described.model)
    for key in ("rope_type", "rope_theta", "factor", "partial_rotary_factor", "low_freq_factor"):
        for value in STRANGE:
            described = describe({**config, "rope_parameters": {"rope_type": "llama3", key: value}})
            assert (described.model is None) == bool(described.faults), (key, value)
    for key in (*_LONG, "factor", "attention_factor", "short_mscale", "long_mscale"):
        for value in (*STRANGE, [1.0] * 8, [None] * 8, [1e400] * 8, [[1.0]] * 8):
            for more in ({}, {"short_mscale": 1.0, "long_mscale": 1.0}):
                described = describe({**config, "rope_parameters": {**_LONG, **more, key: value}})
                assert (described.model is None) == bool(described.faults), (key, value)
