"""Published models, and tiny ones of each family, by name: --model-preset NAME.

A preset is nothing but values of ModelConfig's fields. What it states holds unless a flag gives that
field; what it does not state is derived, as always, from what holds then (ffn_hidden_size 4 x hidden of a GPT, the key/
value heads and the size of a head where they follow from the others). So `--model-preset gpt-125m --hidden-size 1024`
has an MLP of 4096, and `--model-preset llama-3.1-8b --hidden-size 1024` keeps the 14336 that is stated.

    PRESETS["llama-3.1-8b"].values["num_layers"]       # 32
    notes = apply_preset(values)                       # of the model section, in place; values["model_preset"] names it
    ModelConfig.of_preset("tiny-moe", seq_length=64)

* The vocabulary is the published one, which must have room for the tokenizer's: a smaller one is an error when the
  tokenizer is read. Tiny presets state none: theirs is the tokenizer's.
* `max_position_embeddings` is the model's, `seq_length` only where a run starts from: a shorter one (or, without a
  position table, a longer one) is the same model, and resumes the same checkpoints.
* Dropout is 0, except in the GPTs of the paper, which state none: upstream's default is 0.1.
* Nothing is stated of how a model is optimised; `init_method_std` only where a published initializer_range is not 0.02.
* A switch that a preset sets (swiglu, no biases, an untied output layer) cannot be switched off: no flag does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    family: str
    """Whose architecture it is, by transformers' model_type."""
    values: Mapping[str, Any]
    """Field of ModelConfig -> value."""
    source: str
    """Where the values come from. "HF x/y" is config.json of that model on Hugging Face."""
    num_parameters: int | None
    """Of the atomic checkpoint; None where the tokenizer decides."""
    differs: str = ""
    """What the published model has and this one has not."""


def apply_preset(values: dict[str, Any]) -> list[str]:
    """Add what the preset states and nobody gave to the values of the model section, in place. Returns notes."""
    name = values.get("model_preset")
    if name is None:
        return []
    preset = PRESETS[name]
    added = {field: value for field, value in preset.values.items() if field not in values}
    if values.get("use_rotary_position_embeddings"):
        added.pop("position_embedding_type", None)  # Given another way.
    overridden = [field for field in preset.values if field in values]
    values.update(added)
    note = f"--model-preset {name} ({preset.source}) sets " + ", ".join(f"{k} {_shown(v)}" for k, v in added.items())
    if overridden:
        note += "; given otherwise: " + ", ".join(f"{field} {_shown(values[field])}" for field in overridden)
    notes = [note]
    if preset.differs:
        notes.append(f"--model-preset {name} is not all of the published model: {preset.differs}")
    return notes


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


_NO_DROPOUT: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}

_LLAMA: dict[str, Any] = {
    "normalization": "rmsnorm", "swiglu": True, "position_embedding_type": "rope", "add_bias_linear": False,
    **_NO_DROPOUT,
}  # fmt: skip
_LLAMA_3_1: dict[str, Any] = {
    **_LLAMA, "untie_embeddings_and_output_weights": True, "layernorm_epsilon": 1e-5, "rope_theta": 500000.0,
    "rope_scaling_type": "llama3", "rope_scaling_factor": 8.0, "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0, "rope_original_max_position_embeddings": 8192,
}  # fmt: skip
_QWEN3: dict[str, Any] = {**_LLAMA, "layernorm_epsilon": 1e-6, "rope_theta": 1000000.0, "qk_layernorm": True}
_MIXTRAL: dict[str, Any] = {
    **_LLAMA, "untie_embeddings_and_output_weights": True, "layernorm_epsilon": 1e-5, "rope_theta": 1000000.0,
    "expert_interval": 1, "topk": 2, "moe_aux_loss_coeff": 0.02,
}  # fmt: skip
_PHI_MOE: dict[str, Any] = {
    "normalization": "layernorm", "layernorm_epsilon": 1e-5, "swiglu": True, "position_embedding_type": "rope",
    "rope_theta": 10000.0, "add_bias_linear": False, "add_attention_bias": True, "add_output_layer_bias": True,
    "untie_embeddings_and_output_weights": True, "expert_interval": 1, "topk": 2, **_NO_DROPOUT,
    "moe_router_score_function": "sparsemixer",
}  # fmt: skip
_BLOOM: dict[str, Any] = {
    "normalization": "layernorm", "layernorm_epsilon": 1e-5, "position_embedding_type": "alibi",
    "embed_layernorm": True, **_NO_DROPOUT,
}  # fmt: skip
_NEOX: dict[str, Any] = {
    "normalization": "layernorm", "layernorm_epsilon": 1e-5, "position_embedding_type": "rope", "rotary_percent": 0.25,
    "use_parallel_residual": True, "untie_embeddings_and_output_weights": True, **_NO_DROPOUT,
}  # fmt: skip

_BALANCE = "the balance loss is counted by layer and sequence, not over all layers and tokens at once"


def _preset(
    family: str,
    source: str,
    num_parameters: int | None,
    shape: tuple[int, int, int],
    seq_length: int,
    differs: str = "",
    **values: Any,
) -> Preset:
    """`shape`: blocks, hidden size, query heads."""
    layers, hidden, heads = shape
    stated = {
        "num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "seq_length": seq_length, **values
    }  # fmt: skip
    return Preset(family, MappingProxyType(stated), source, num_parameters, differs)


def _tiny(family: str, **values: Any) -> Preset:
    """4 blocks, hidden 64, 4 heads, 128 positions: a CPU trains it in seconds, and 2 tensor parallel ranks cut it."""
    values = {"max_position_embeddings": 128, **values}
    return _preset(family, "made up for CPUs", None, (4, 64, 4), 128, **values)


_PAPER = "shape: UCP paper (Lian et al. 2025); GPT-2's vocabulary, 2048 positions as GPT-3 (Brown et al. 2020)"

PRESETS: Mapping[str, Preset] = MappingProxyType({
    "gpt-125m": _preset(
        "gpt2", "UCP paper's artifact, GPT-2's vocabulary", 124_439_808, (12, 768, 12), 1024,
        max_position_embeddings=1024, vocab_size=50257,
    ),
    "gpt-350m": _preset(
        "gpt2", _PAPER, 355_871_744, (24, 1024, 16), 2048, max_position_embeddings=2048, vocab_size=50257
    ),
    "gpt-7b": _preset(
        "gpt2", _PAPER, 6_658_404_352, (32, 4096, 32), 2048, max_position_embeddings=2048, vocab_size=50257
    ),
    "gpt-176b": _preset(
        "gpt2", _PAPER, 173_400_471_552, (70, 14336, 112), 2048, max_position_embeddings=2048, vocab_size=50257
    ),
    "llama-3.1-8b": _preset(
        "llama", "HF meta-llama/Llama-3.1-8B", 8_030_261_248, (32, 4096, 32), 8192,
        num_key_value_heads=8, ffn_hidden_size=14336, max_position_embeddings=131072, vocab_size=128256, **_LLAMA_3_1,
    ),
    "bloom-176b": _preset(
        "bloom", "HF bigscience/bloom; 2048 positions: its model card", 176_247_271_424, (70, 14336, 112), 2048,
        max_position_embeddings=2048, vocab_size=250880, **_BLOOM,
    ),
    "phi-3.5-moe-42b": _preset(
        "phimoe", "HF microsoft/Phi-3.5-MoE-instruct", 41_873_153_344, (32, 4096, 32), 4096,
        "plain rotary positions (published: LongRoPE, whose factors --use-checkpoint-args takes from the model)",
        num_key_value_heads=8, ffn_hidden_size=6400, num_experts=(16,), max_position_embeddings=131072,
        vocab_size=32064, **_PHI_MOE,
    ),
    "yulan-mini-2.4b": _preset(
        "llama", "HF yulan-team/YuLan-Mini", 2_424_375_168, (56, 1920, 30), 4096,
        "as released, with every multiplier merged into the weights: in its own training the embedding (x 10), the "
        "residual branches (x 1.4 / sqrt(56)) and each matrix (WeSaR) had one, the output layer was tied, attention's "
        "output had no bias, and initial weights were 5e-5",
        num_key_value_heads=6, ffn_hidden_size=4800, max_position_embeddings=28723, vocab_size=99000,
        add_attention_bias=True, untie_embeddings_and_output_weights=True, layernorm_epsilon=1e-6, rope_theta=490000.0,
        **_LLAMA,
    ),
    "mixtral-8x7b": _preset(
        "mixtral", "HF mistralai/Mixtral-8x7B-v0.1", 46_702_792_704, (32, 4096, 32), 4096, _BALANCE,
        num_key_value_heads=8, ffn_hidden_size=14336, num_experts=(8,), max_position_embeddings=32768,
        vocab_size=32000, **_MIXTRAL,
    ),
    "qwen3-0.6b": _preset(
        "qwen3", "HF Qwen/Qwen3-0.6B", 596_049_920, (28, 1024, 16), 4096,
        num_key_value_heads=8, kv_channels=128, ffn_hidden_size=3072, max_position_embeddings=40960,
        vocab_size=151936, **_QWEN3,
    ),
    "smollm2-135m": _preset(
        "llama", "HF HuggingFaceTB/SmolLM2-135M", 134_515_008, (30, 576, 9), 2048,
        num_key_value_heads=3, ffn_hidden_size=1536, max_position_embeddings=8192, vocab_size=49152,
        layernorm_epsilon=1e-5, rope_theta=100000.0, init_method_std=0.041666666666666664, **_LLAMA,
    ),
    "pythia-160m": _preset(
        "gpt_neox", "HF EleutherAI/pythia-160m", 162_322_944, (12, 768, 12), 2048,
        max_position_embeddings=2048, vocab_size=50304, exact_gelu=True, **_NEOX,
    ),
    "pythia-1b": _preset(
        "gpt_neox", "HF EleutherAI/pythia-1b", 1_011_781_632, (16, 2048, 8), 2048,
        max_position_embeddings=2048, vocab_size=50304, exact_gelu=True, **_NEOX,
    ),
    "tiny-gpt": _tiny("gpt2", **_NO_DROPOUT),
    "tiny-llama": _tiny("llama", num_key_value_heads=2, ffn_hidden_size=192, **_LLAMA_3_1),
    "tiny-bloom": _tiny("bloom", **_BLOOM),
    "tiny-neox": _tiny("gpt_neox", differs="GELU by tanh, as GPT-NeoX-20B (Pythia: exact)", **_NEOX),
    "tiny-qwen3": _tiny("qwen3", num_key_value_heads=2, kv_channels=32, ffn_hidden_size=192, **_QWEN3),
    "tiny-moe": _tiny(
        "mixtral", differs=_BALANCE, num_key_value_heads=2, ffn_hidden_size=96, num_experts=(4,), **_MIXTRAL
    ),
    "tiny-phi-moe": _tiny(
        "phimoe", num_key_value_heads=2, ffn_hidden_size=96, num_experts=(4,), **_PHI_MOE
    ),
})  # fmt: skip
