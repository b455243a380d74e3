"""`args` in a checkpoint of another Megatron: the model in our words, how far it was trained, its schedule.

described = describe(vars(content["args"]))
described.model, described.faults                 # None where there are faults
schedule_of(content["opt_param_scheduler"], args) # what a ucp.json's common["schedule"] is

An argument that is not there has the default that programs had before they knew it. What would make the model compute
something else than ours is a fault. Sources: megatron-core 0.16.1 (transformer_config.py), NVIDIA/Megatron-LM and
deepspeedai/Megatron-DeepSpeed, megatron/training/arguments.py and megatron/arguments.py, optimizer_param_scheduler.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.json_checks import number, passes, shown, whole
from megatron.ucp.naming.gpt_model import GptModel, sound_settings
from megatron.ucp.stand_ins import global_of
from megatron.ucp.stored import is_tensor

_AS_OURS: Mapping[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "apply_layernorm_1p": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "rotary_interleaved": (False,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "mtp_num_layers": (None, 0),
    "window_size": (None,),
    "softmax_type": ("vanilla",),
    "no_rope_freq": (None,),
    "is_hybrid_model": (False,),
    "glu_linear_offset": (0, 0.0),
    "activation_func_clamp_value": (None,),
    "heterogeneous_layers_config_path": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_num_groups": (None,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_shared_expert_gate": (False,),
    "mlp_type": ("standard",),
    "glu_activation": (None,),
}
"""Arguments, and the values with which the model computes what ours computes."""
_POSITIONS = ("learned_absolute", "rope", "alibi", "none")
_POSITIONS_BY_NUMBER = {1: "rope", 2: "learned_absolute", 3: "alibi"}
"""Of an enum's members in BLOOM's fork (bigscience-workshop/Megatron-DeepSpeed, megatron/enums.py)."""
_COUNTERS = ("iteration", "consumed_train_samples", "consumed_valid_samples", "consumed_train_tokens")


@dataclass(frozen=True)
class Described:
    model: GptModel | None
    """None where there are faults. Its vocabulary has no padding where `args` know how long it is."""
    settings: Mapping[str, Any]
    progress: Mapping[str, int]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def describe(args: Mapping[str, Any], vocab_size: int | None = None) -> Described:
    """`vocab_size`: true size of the vocabulary, before what `args` say of it."""
    reading = _Reading({key: value for key, value in args.items() if not is_tensor(value)}, vocab_size)
    values, faults, model = reading.values(), reading.faults, None
    if not faults:
        try:
            model = GptModel.of(values)
            faults += model.faults()
        except UnsupportedCheckpointError as error:
            faults += error.found if isinstance(error.found, list) else [str(error.found)]
    progress = {key: int(args[key]) for key in _COUNTERS if passes(whole(), args.get(key))}
    return Described(
        None if faults else model, reading.settings(), progress, tuple(sorted(faults)), tuple(reading.notes)
    )


class _Reading:
    def __init__(self, args: Mapping[str, Any], vocab_size: int | None):
        self.args, self.vocab_size = args, vocab_size
        self.faults: list[str] = []
        self.notes: list[str] = []

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first that has a value: programs differ in their words."""
        return next((self.args[key] for key in keys if self.args.get(key) is not None), default)

    def values(self) -> dict[str, Any]:
        """GptModel's, as far as they are sound."""
        for key, allowed in _AS_OURS.items():
            value = self.args.get(key, allowed[0])
            if not isinstance(value, (bool, int, float, str, type(None))) or value not in allowed:
                self.faults.append(f"--{key.replace('_', '-')} {shown(value)}: not computed here")
        sizes = ("num_layers", "hidden_size", "num_attention_heads")
        if missing := [key for key in sizes if not passes(whole(1), self.get(key))]:
            self.faults.append(f"args without {', '.join(missing)}")
            return {}
        layers, hidden, heads = (self.get(key) for key in sizes)
        swiglu = bool(self.get("swiglu", default=False))
        biases = bool(self.get("add_bias_linear", default=True))
        values = {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": self._key_value_heads(heads),
            "kv_channels": self.get("kv_channels", default=hidden // heads),
            "ffn_hidden_size": self.get("ffn_hidden_size", default=4 * hidden),
            "vocab_size": self._vocab_size(),
            "normalization": str(self.get("normalization", default="layernorm")).lower(),
            "layernorm_epsilon": self.get("norm_epsilon", "layernorm_epsilon", default=1e-5),
            "swiglu": swiglu,
            "untie_embeddings_and_output_weights": bool(self.get("untie_embeddings_and_output_weights", default=False)),
            "add_bias_linear": biases,
            "has_qkv_bias": biases or bool(self.get("add_qkv_bias", default=False)),
            "has_attention_output_bias": biases,
            "qk_layernorm": bool(self.get("qk_layernorm", default=False)),
            "embed_layernorm": bool(self.get("embed_layernorm", default=False)),
            "use_parallel_residual": False,
            "add_output_layer_bias": False,
            "exact_gelu": not swiglu and not self._is_tanh_gelu(biases),
            **self._positions(),
        }
        return {**values, **self._experts(layers)}

    def settings(self) -> dict[str, Any]:
        return sound_settings(self.args)

    def _key_value_heads(self, heads: int) -> Any:
        if self.get("group_query_attention", default=False):
            return self.get("num_query_groups", default=heads)
        return self.get("num_key_value_heads", default=heads)

    def _vocab_size(self) -> Any:
        padded = self.get("padded_vocab_size")
        known = self.vocab_size or self.get("vocab_size")
        if self.vocab_size is None and passes(whole(1), known) and self.get("tokenizer_type") == "NullTokenizer":
            known += 1  # the end of a document, which the flag does not count
        if known is None and padded is not None:
            self.notes.append(
                f"args do not say how long the vocabulary is without its padding: all {shown(padded)} rows are taken "
                "(--vocab-size says it)"
            )
        return padded if known is None else known

    def _positions(self) -> dict[str, Any]:
        default = "learned_absolute"
        if self.get("use_rotary_position_embeddings", default=False):
            default = "rope"
        elif self.get("use_alibi_position_embeddings", default=False):
            default = "alibi"
        elif self.args.get("add_position_embedding") is False:
            default = "none"
        kind = self.get("position_embedding_type", default=default)
        if (global_of(type(kind)) or "").endswith(".PositionEmbeddingType"):
            member = next(iter(kind.values), None)
            kind = _POSITIONS_BY_NUMBER.get(member, kind) if passes(whole(), member) else kind
        kind = default if default == "rope" and kind == "learned_absolute" else kind
        if kind not in _POSITIONS:
            self.faults.append(f"--position-embedding-type {shown(kind)}: known are {', '.join(_POSITIONS)}")
        values: dict[str, Any] = {"positions": kind}
        if kind == "learned_absolute":
            values["max_position_embeddings"] = self.get("max_position_embeddings", "seq_length")
        if kind == "rope":
            values["rope_theta"] = self.get("rotary_base", "rope_theta", default=10000)
            values["rotary_percent"] = self.get("rotary_percent", default=1.0)
            values |= self._rope_scaling()
        return values

    def _rope_scaling(self) -> dict[str, Any]:
        if self.get("use_rope_scaling", default=False):  # Llama 3.1's, whose other values the program has fixed
            return {"rope_scaling_type": "llama3", "rope_scaling_factor": self.get("rope_scaling_factor", default=8.0)}
        factor = self.get("rotary_seq_len_interpolation_factor")
        return {} if factor in (None, 1, 1.0) else {"rope_scaling_type": "linear", "rope_scaling_factor": factor}

    def _is_tanh_gelu(self, biases: bool) -> bool:
        """Both programs' GELU is the error function's, but for their fused bias and GELU (fused_bias_gelu.py)."""
        return bool(self.get("openai_gelu", default=False) or (biases and self.get("bias_gelu_fusion", default=True)))

    def _experts(self, layers: int) -> dict[str, Any]:
        count = self.get("num_experts", default=1)
        if isinstance(count, (list, tuple)) and count and all(other == count[0] for other in count):
            count = count[0]
        if count in (None, 0, 1):
            return {}
        step = self.get("moe_layer_freq", default=1)
        has_experts = list(step) if isinstance(step, (list, tuple)) else None
        if not passes(whole(2), count) or not (has_experts is not None or passes(whole(1), step)):
            self.faults.append(f"{shown(count)} experts in every {shown(step)} block: no numbers")
            return {}
        if has_experts is None:
            has_experts = [int(layer % step == 0) for layer in range(min(layers, 1 << 12))]
        topk = self.get("moe_router_topk", default=2)
        is_normalized = not self.get("moe_router_pre_softmax", default=False)
        if topk == 1 and is_normalized:
            self.faults.append("one expert a token whose score is divided by itself is not computed here")
        return {
            "num_experts": [count if there else 1 for there in has_experts],
            "topk": topk,
            "moe_ffn_hidden_size": self.get("moe_ffn_hidden_size", "ffn_hidden_size"),
            "moe_shared_expert_intermediate_size": self.get("moe_shared_expert_intermediate_size", default=0),
            "moe_router_score_function": self.get("moe_router_score_function", default="softmax"),
            "moe_normalize_topk": is_normalized,
        }


def schedule_of(state: Any, args: Mapping[str, Any]) -> dict[str, Any] | None:
    """None where there is none, or what it says cannot be."""
    if not isinstance(state, Mapping) or state.get("lr_decay_tokens") or state.get("lr_warmup_tokens"):
        return None  # a schedule over tokens
    found = {
        "num_samples": state.get("num_steps"),
        "max_lr": state.get("max_lr"),
        "min_lr": state.get("min_lr"),
        "warmup": state.get("lr_warmup_steps"),
        "decay": state.get("lr_decay_steps"),
        "start_weight_decay": state.get("start_wd"),
        "end_weight_decay": state.get("end_wd"),
        "weight_decay_length": state.get("wd_incr_steps"),
    }
    if not all(passes(number(0), value) for value in found.values()) or not isinstance(found["num_samples"], int):
        return None
    styles = state.get("lr_decay_style"), state.get("wd_incr_style")
    if not all(isinstance(style, str) for style in styles) or styles[0] == "WSD":
        return None  # how long the last part of WSD is, the file does not say
    init_lr = args.get("lr_warmup_init")
    return {
        **found,
        "init_lr": init_lr if passes(number(0), init_lr) else 0.0,
        "style": styles[0],
        "weight_decay_style": styles[1],
    }
