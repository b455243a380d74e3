"""config.json of the models that presets are of, as published on Hugging Face, and what each says in our words.

Independent of megatron/config/presets.py: numbers are written here once more, from their source. What decides neither
shapes nor values of the function is left out (token ids, caching, dtypes), and LongRoPE's 64 factors of Phi-3.5-MoE,
which we have not.

    config = huggingface_config("llama-3.1-8b")      # a transformers config
    fields = fields_of(config)                       # the fields of ModelConfig that it decides
"""

_LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _of(model_type, **values):
    return {"model_type": model_type} | values


def _gpt2(layers, hidden, heads, positions, **more):
    shape = _of("gpt2", n_layer=layers, n_embd=hidden, n_head=heads, n_positions=positions)
    return shape | {"vocab_size": 50257, "layer_norm_epsilon": 1e-5} | more


def _pythia(layers, hidden, heads):
    return _of(
        "gpt_neox", hidden_act="gelu", hidden_size=hidden, initializer_range=0.02, intermediate_size=4 * hidden,
        layer_norm_eps=1e-5, max_position_embeddings=2048, num_attention_heads=heads, num_hidden_layers=layers,
        rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True,
        vocab_size=50304,
    )  # fmt: skip


CONFIGS = {
    # Not published: GPT-2's architecture (openai-community/gpt2) in the sizes of the UCP paper and artifact.
    "gpt-125m": _gpt2(12, 768, 12, 1024),
    "gpt-350m": _gpt2(24, 1024, 16, 2048),
    "gpt-7b": _gpt2(32, 4096, 32, 2048),
    "gpt-176b": _gpt2(70, 14336, 112, 2048),
    "llama-3.1-8b": _of(
        "llama", attention_bias=False, attention_dropout=0.0, hidden_act="silu", hidden_size=4096,
        initializer_range=0.02, intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_scaling=_LLAMA_3,
        rope_theta=500000.0, tie_word_embeddings=False, vocab_size=128256,
    ),
    "bloom-176b": _of(
        "bloom", apply_residual_connection_post_layernorm=False, attention_dropout=0.0, hidden_dropout=0.0,
        hidden_size=14336, initializer_range=0.02, layer_norm_epsilon=1e-5, n_head=112, n_layer=70, vocab_size=250880,
    ),
    "phi-3.5-moe-42b": _of(
        "phimoe", attention_bias=True, attention_dropout=0.0, hidden_act="silu", hidden_size=4096,
        initializer_range=0.02, intermediate_size=6400, lm_head_bias=True, max_position_embeddings=131072,
        num_attention_heads=32, num_experts_per_tok=2, num_hidden_layers=32, num_key_value_heads=8,
        num_local_experts=16, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, vocab_size=32064,
    ),
    "yulan-mini-2.4b": _of(
        "llama", attention_bias=True, attention_dropout=0.0, head_dim=64, hidden_act="silu",
        hidden_size=1920, intermediate_size=4800, max_position_embeddings=28723, mlp_bias=False,
        num_attention_heads=30, num_hidden_layers=56, num_key_value_heads=6, rms_norm_eps=1e-6, rope_scaling=None,
        rope_theta=490000.0, tie_word_embeddings=False, vocab_size=99000,
    ),
    "mixtral-8x7b": _of(
        "mixtral", attention_dropout=0.0, hidden_act="silu", hidden_size=4096, initializer_range=0.02,
        intermediate_size=14336, max_position_embeddings=32768, num_attention_heads=32, num_experts_per_tok=2,
        num_hidden_layers=32, num_key_value_heads=8, num_local_experts=8, rms_norm_eps=1e-5, rope_theta=1000000.0,
        router_aux_loss_coef=0.02, sliding_window=None, tie_word_embeddings=False, vocab_size=32000,
    ),
    "qwen3-0.6b": _of(
        "qwen3", attention_bias=False, attention_dropout=0.0, head_dim=128, hidden_act="silu",
        hidden_size=1024, initializer_range=0.02, intermediate_size=3072, max_position_embeddings=40960,
        num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None,
        rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936,
    ),
    "smollm2-135m": _of(
        "llama", attention_bias=False, attention_dropout=0.0, hidden_act="silu", hidden_size=576,
        initializer_range=0.041666666666666664, intermediate_size=1536, max_position_embeddings=8192, mlp_bias=False,
        num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3, rms_norm_eps=1e-5, rope_scaling=None,
        rope_theta=100000, tie_word_embeddings=True, vocab_size=49152,
    ),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-1b": _pythia(16, 2048, 8),
    # The tiny ones, each as its family's large one, with a vocabulary of 101.
    "tiny-gpt": _gpt2(4, 64, 4, 128, vocab_size=101, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "tiny-llama": _of(
        "llama", hidden_size=64, intermediate_size=192, max_position_embeddings=128, num_attention_heads=4,
        num_hidden_layers=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_scaling=_LLAMA_3, rope_theta=500000.0,
        tie_word_embeddings=False, vocab_size=101,
    ),
    "tiny-bloom": _of("bloom", hidden_size=64, n_head=4, n_layer=4, vocab_size=101),
    "tiny-neox": _of(
        "gpt_neox", hidden_act="gelu_new", hidden_size=64, intermediate_size=256,
        max_position_embeddings=128, num_attention_heads=4, num_hidden_layers=4, rotary_emb_base=10000,
        rotary_pct=0.25, layer_norm_eps=1e-5, tie_word_embeddings=False, use_parallel_residual=True, vocab_size=101,
    ),
    "tiny-qwen3": _of(
        "qwen3", head_dim=32, hidden_size=64, intermediate_size=192, max_position_embeddings=128,
        num_attention_heads=4, num_hidden_layers=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000000.0,
        tie_word_embeddings=True, vocab_size=101,
    ),
    "tiny-moe": _of(
        "mixtral", hidden_size=64, intermediate_size=96, max_position_embeddings=128, num_attention_heads=4,
        num_experts_per_tok=2, num_hidden_layers=4, num_key_value_heads=2, num_local_experts=4, rms_norm_eps=1e-5,
        rope_theta=1000000.0, router_aux_loss_coef=0.02, tie_word_embeddings=False, vocab_size=101,
    ),
    "tiny-phi-moe": _of(
        "phimoe", attention_bias=True, hidden_size=64, intermediate_size=96, lm_head_bias=True,
        max_position_embeddings=128, num_attention_heads=4, num_experts_per_tok=2, num_hidden_layers=4,
        num_key_value_heads=2, num_local_experts=4, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
        vocab_size=101,
    ),
}  # fmt: skip


def huggingface_config(name):
    from transformers import AutoConfig

    # A copy: transformers writes into rope_scaling.
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in CONFIGS[name].items()}
    return AutoConfig.for_model(values.pop("model_type"), attn_implementation="eager", **values)


def fields_of(config):
    """Every field of ModelConfig that a preset states, except the length of a sample and, of GPT-2, dropout."""
    family = config.model_type
    is_rotary = family not in ("gpt2", "bloom")
    is_rms = family in ("llama", "qwen3", "mixtral")
    fields = {
        "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "vocab_size": config.vocab_size,
        "num_attention_heads": config.num_attention_heads, "init_method_std": config.initializer_range,
        "num_key_value_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "ffn_hidden_size": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "normalization": "rmsnorm" if is_rms else "layernorm",
        "layernorm_epsilon": next(
            getattr(config, key) for key in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
            if hasattr(config, key)
        ),
        "exact_gelu": family == "gpt_neox" and config.hidden_act == "gelu",
        "embed_layernorm": family == "bloom", "qk_layernorm": family == "qwen3",
        "use_parallel_residual": getattr(config, "use_parallel_residual", False),
        "swiglu": getattr(config, "hidden_act", "") == "silu",
        "position_embedding_type": "rope" if is_rotary else "alibi" if family == "bloom" else "learned_absolute",
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "add_bias_linear": family in ("gpt2", "bloom", "gpt_neox"),
        "add_attention_bias": family in ("llama", "phimoe", "qwen3") and config.attention_bias,
        "add_output_layer_bias": getattr(config, "lm_head_bias", False),
        "num_experts": (getattr(config, "num_local_experts", 1),),
    }  # fmt: skip
    if family != "bloom":
        fields["max_position_embeddings"] = config.max_position_embeddings
    if family != "gpt2":
        dropout = getattr(config, "hidden_dropout", 0.0)
        fields |= {"hidden_dropout": dropout, "attention_dropout": config.attention_dropout}
    if is_rotary:
        fields |= _rotary_fields(config.rope_parameters)
    if family == "phimoe":
        fields["moe_router_score_function"] = "sparsemixer"
    if fields["num_experts"] != (1,):
        fields |= {"topk": config.num_experts_per_tok, "expert_interval": 1}
    if family == "mixtral":
        fields["moe_aux_loss_coeff"] = config.router_aux_loss_coef
    return fields


def _rotary_fields(rope):
    fields = {"rope_theta": rope["rope_theta"], "rotary_percent": rope.get("partial_rotary_factor", 1.0)}
    if rope["rope_type"] == "llama3":
        fields |= {
            "rope_scaling_type": "llama3", "rope_scaling_factor": rope["factor"],
            "rope_low_freq_factor": rope["low_freq_factor"], "rope_high_freq_factor": rope["high_freq_factor"],
            "rope_original_max_position_embeddings": rope["original_max_position_embeddings"],
        }  # fmt: skip
    else:
        assert rope["rope_type"] == "default", rope
    return fields
