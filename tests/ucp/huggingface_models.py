"""Tiny models of every architecture, made and saved by transformers; and ours, filled from any Source.

folder = saved(tmp_path, "qwen3")           # weights and norms away from 0 and 1
logits = ours(open_source(folder), tokens)
"""

import torch

VOCABULARY = 101
_SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCABULARY, "num_hidden_layers": 3}
_ROTARY = {**_SHAPE, "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 12,
    "short_factor": [1.0, 1.5, 2.0, 1.25], "long_factor": [3.0, 2.0, 5.0, 4.0],
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64, "vocab_size": VOCABULARY, "attn_pdrop": 0.0,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip

MODELS = {
    "gpt2": ("gpt2", _GPT2),
    "gpt2 untied": ("gpt2", {**_GPT2, "tie_word_embeddings": False, "n_inner": 48}),
    "gpt2 by the error function": ("gpt2", {**_GPT2, "activation_function": "gelu"}),
    "bloom": ("bloom", {"hidden_size": 48, "n_head": 6, "n_layer": 3, "vocab_size": VOCABULARY}),
    "gpt_neox": ("gpt_neox", {**_SHAPE, "intermediate_size": 80, "max_position_embeddings": 64}),
    "gpt_neox in a row": ("gpt_neox", {**_SHAPE, "intermediate_size": 80, "hidden_act": "gelu_new",
                                       "use_parallel_residual": False, "tie_word_embeddings": True,
                                       "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                                           "partial_rotary_factor": 0.5}}),
    "llama": ("llama", _ROTARY),
    "llama tied": ("llama", {**_ROTARY, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama 3": ("llama", {**_ROTARY, "rope_parameters": _LLAMA3, "head_dim": 16}),
    "llama linear": ("llama", {**_ROTARY, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0,
                                                              "factor": 4.0}}),
    "llama with biases": ("llama", {**_ROTARY, "attention_bias": True, "mlp_bias": True}),
    "llama with attention's biases": ("llama", {**_ROTARY, "attention_bias": True}),
    "mistral": ("mistral", {**_ROTARY, "sliding_window": None}),
    "qwen2": ("qwen2", {**_ROTARY, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_ROTARY, "head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {**_ROTARY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                "mlp_only_layers": [0, 2], "head_dim": 16}),
    "mixtral": ("mixtral", {**_ROTARY, "num_local_experts": 4}),
    "llama longrope": ("llama", {**_ROTARY, "rope_parameters": _LONG_ROPE}),
    "phimoe": ("phimoe", {**_ROTARY, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True,
                          "router_jitter_noise": 0.2}),
    "phimoe longrope": ("phimoe", {**_ROTARY, "num_local_experts": 4, "attention_bias": True,
                                   "rope_parameters": {**_LONG_ROPE, "short_mscale": 1.2, "long_mscale": 1.3}}),
}  # fmt: skip


def made(name, **changes):
    """transformers' model, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    model_type, values = MODELS[name]
    config = AutoConfig.for_model(model_type, attn_implementation="eager", **{**values, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, param in model.named_parameters():
            if param.dim() == 1:  # biases and norms away from 0 and 1, or a mistake in them would not show
                param.copy_(torch.rand(len(param)) - 0.5 + (1.0 if "norm" in key or "ln_" in key else 0.0))
            else:
                param.mul_(5.0 if "gate" in key and "proj" not in key else 3.0)
    return model


def saved(folder, name, **changes):
    path = folder / name.replace(" ", "_")
    made(name).save_pretrained(path, **changes)
    return path


def ours(source, tokens):
    """Logits of our plain model with the Source's weights."""
    with torch.no_grad():
        return our_model(source, tokens.shape[1]).eval().logits(tokens)


def our_model(source, seq_length, **settings):
    """Our plain model with the Source's weights, in fp32. `settings`: more of ModelConfig's fields."""
    from megatron.config.checkpoint_args import model_values
    from megatron.config.model import ModelConfig
    from megatron.config.parallel import ParallelConfig
    from megatron.layers.router_ledger import RouterLedger
    from megatron.model.build import build_model
    from megatron.parallel.context import ParallelContext
    from megatron.parallel.rng import RandomStreams
    from megatron.ucp.execute import read_into
    from megatron.ucp.naming.gpt_model import GptModel
    from megatron.ucp.runs import shard_runs

    values = model_values(GptModel.of(source.manifest.model), source.folder)
    config = ModelConfig(seq_length=seq_length, hidden_dropout=0.0, attention_dropout=0.0, **values, **settings)
    context = ParallelContext.single()
    streams = RandomStreams(1, context)
    model = build_model(config, ParallelConfig(no_pipeline_parallel=True), context, streams, 1, ledger=RouterLedger())
    with torch.no_grad():
        for name, param in model.named_parameters():
            flat = torch.zeros(param.numel())
            read_into(source, name, "fp32", shard_runs(param.atomic_layout, param.shard_rank), flat)
            param.copy_(flat.view(param.shape))
    return model


def tokens():
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
