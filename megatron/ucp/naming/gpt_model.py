"""The model that a checkpoint is of, as its ucp.json describes it, and the layouts of all its parameters.

A run writes these values from its configuration, and a config.json of Hugging Face's says them in other
words. They decide names and shapes of the atomic parameters and the function they compute.

    model = GptModel.of(manifest.model)          # raises UnsupportedCheckpointError with all that is wrong
    layouts(model)["layers.0.attention.query_key_value.weight"]
    model.to_json() == manifest.model

Names and layouts are those that megatron/layers declares; a test builds a model of each family and compares.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.json_checks import flag, list_of, number, one_of, passes, record, whole
from megatron.ucp.layout import Cut, Layout, Part
from megatron.ucp.naming.adapters import (
    KINDS,
    PROJECTIONS,
    chosen_parts,
    column_layouts,
    projection_faults,
    row_layouts,
)

UNSAID: Mapping[str, Any] = {"exact_gelu": False, "lora_rank": 0}
"""Fields that a ucp.json says only where they are otherwise: they came after the first checkpoints."""
MAX_LAYERS, MAX_EXPERTS, MAX_HEADS = 1 << 12, 1 << 16, 1 << 16
"""Of a model; more is no model but a file that wants memory."""
_ROPE = ("rope_theta", "rotary_percent", "rope_scaling_type")
_ORIGINAL = "rope_original_max_position_embeddings"
OF_SCALING: Mapping[str | None, tuple[str, ...]] = {
    None: (),
    "linear": ("rope_scaling_factor",),
    "ntk": ("rope_scaling_factor",),
    "llama3": ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", _ORIGINAL),
    "longrope": (_ORIGINAL, "rope_short_factors", "rope_long_factors", "rope_short_mscale", "rope_long_mscale"),
}
"""rope_scaling_type -> the fields that it has."""
OF_ADAPTERS = ("lora_rank", "lora_alpha", "lora_projections", "lora_fused")
_OF_EXPERTS = (
    "num_experts",
    "topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_score_function",
    "moe_normalize_topk",
    "moe_sparsemixer_eps",
)


@dataclass(frozen=True)
class GptModel:
    """Fields are ModelConfig's of the same names, or its properties."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    kv_channels: int
    vocab_size: int
    normalization: str
    layernorm_epsilon: float
    swiglu: bool
    positions: str
    untie_embeddings_and_output_weights: bool
    add_bias_linear: bool
    qk_layernorm: bool
    embed_layernorm: bool
    use_parallel_residual: bool
    has_qkv_bias: bool
    has_attention_output_bias: bool
    add_output_layer_bias: bool
    max_position_embeddings: int | None = None
    """Of a position table."""
    rope_theta: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling_type: str | None = None
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    rope_short_factors: tuple[float, ...] = ()
    rope_long_factors: tuple[float, ...] = ()
    """Of each pair of rotated features."""
    rope_short_mscale: float = 1.0
    rope_long_mscale: float = 1.0
    num_experts: tuple[int, ...] = ()
    """Of each block, 1 where it has an ordinary MLP; empty where none has experts."""
    topk: int = 1
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int = 0
    moe_router_score_function: str = "softmax"
    moe_normalize_topk: bool = True
    moe_sparsemixer_eps: float = 0.01
    exact_gelu: bool = False
    lora_rank: int = 0
    """Of adapters (naming/adapters.py); 0: the model has none."""
    lora_alpha: float = 1.0
    lora_projections: tuple[str, ...] = ()
    lora_fused: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any], where: object = None) -> GptModel:
        """Of a ucp.json's `model`. Raises UnsupportedCheckpointError with all that is missing or cannot be."""
        faults: list[str] = []
        _CHECK(lambda place, what: faults.append(f"{place.lstrip('.')}: {what}"), "", dict(values))
        if faults:
            raise UnsupportedCheckpointError(
                "the checkpoint does not say of which model it is, or not in our words",
                found=faults,
                where=where,
                do="export a checkpoint that pretrain_gpt.py saved, or a conversion of one",
            )
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known
        }
        return cls(**given)

    def faults(self) -> list[str]:
        """What does not fit together."""
        found = []
        if self.num_attention_heads % self.num_key_value_heads:
            found.append(f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} keys evenly")
        if self.num_experts and len(self.num_experts) != self.num_layers:
            found.append(f"experts of {len(self.num_experts)} blocks, of {self.num_layers}")
        if sum(self.num_experts) > MAX_EXPERTS:
            found.append(f"{sum(self.num_experts)} experts, of at most {MAX_EXPERTS}")
        if self.has_experts and self.moe_ffn_hidden_size is None:
            found.append("experts, and not how wide they are")
        if self.positions == "learned_absolute" and self.max_position_embeddings is None:
            found.append("a position table, and not how long it is")
        if self.rope_scaling_type == "longrope":
            found += self._factor_faults()
        if self.lora_rank:
            found += projection_faults(
                self.lora_projections, is_gated=self.swiglu, has_experts=self.has_experts, is_fused=self.lora_fused
            )
        if self.swiglu and self.exact_gelu:
            found.append("SwiGLU and an exact GELU")
        if self.has_experts and self.topk > min(count for count in self.num_experts if count > 1):
            found.append(f"{self.topk} experts a token, of {sorted(set(self.num_experts))}")
        return found

    def _factor_faults(self) -> list[str]:
        pairs = int(self.kv_channels * self.rotary_percent) // 2
        found = []
        for name in ("rope_short_factors", "rope_long_factors"):
            factors = getattr(self, name)
            if len(factors) != pairs or min(factors, default=1) <= 0:
                found.append(f"{name}: {len(factors)} from {min(factors, default=0):g} up, not {pairs} above 0")
        return found

    @property
    def has_experts(self) -> bool:
        return any(count > 1 for count in self.num_experts)

    def num_experts_of(self, layer: int) -> int:
        return self.num_experts[layer] if self.num_experts else 1

    def to_json(self) -> dict[str, Any]:
        """Of parts that the model does not have, nothing."""
        left_out = set() if self.positions == "learned_absolute" else {"max_position_embeddings"}
        left_out |= set() if self.positions == "rope" else set(_ROPE)
        left_out |= set().union(*OF_SCALING.values()) - set(OF_SCALING[self.rope_scaling_type])
        left_out |= set() if self.has_experts else set(_OF_EXPERTS)
        left_out |= set() if self.moe_router_score_function == "sparsemixer" else {"moe_sparsemixer_eps"}
        left_out |= set() if self.lora_rank else set(OF_ADAPTERS)
        left_out |= {name for name, value in UNSAID.items() if getattr(self, name) == value}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_SIZE = whole(1, 1 << 32)
_CHECK = record(
    {
        "num_layers": whole(1, MAX_LAYERS),
        **dict.fromkeys(("hidden_size", "ffn_hidden_size", "kv_channels", "vocab_size"), _SIZE),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), whole(1, MAX_HEADS)),
        "normalization": one_of("layernorm", "rmsnorm"),
        "layernorm_epsilon": number(0, 1),
        "positions": one_of("learned_absolute", "rope", "alibi", "none"),
        **dict.fromkeys(("swiglu", "untie_embeddings_and_output_weights", "add_bias_linear", "qk_layernorm"), flag),
        **dict.fromkeys(("embed_layernorm", "use_parallel_residual", "has_qkv_bias"), flag),
        **dict.fromkeys(("has_attention_output_bias", "add_output_layer_bias"), flag),
        "max_position_embeddings": _SIZE,
        "rope_theta": number(1),
        "rotary_percent": number(0, 1),
        "rope_scaling_factor": number(0),
        "rope_low_freq_factor": number(0),
        "rope_high_freq_factor": number(0),
        "rope_original_max_position_embeddings": _SIZE,
        "rope_scaling_type": one_of(*OF_SCALING),
        **dict.fromkeys(("rope_short_factors", "rope_long_factors"), list_of(number(0, 1e9), 0, 1 << 16)),
        **dict.fromkeys(("rope_short_mscale", "rope_long_mscale"), number(0, 1e6)),
        "num_experts": list_of(whole(1, MAX_EXPERTS), 0, MAX_LAYERS),
        **dict.fromkeys(("topk", "moe_ffn_hidden_size"), _SIZE),
        "moe_shared_expert_intermediate_size": whole(0, 1 << 32),
        "moe_router_score_function": one_of("softmax", "sigmoid", "sparsemixer"),
        "moe_sparsemixer_eps": number(0, 1),
        "moe_normalize_topk": flag,
        "exact_gelu": flag,
        "lora_rank": whole(0, 1 << 16),
        "lora_alpha": number(0, 1e6),
        "lora_projections": list_of(one_of(*PROJECTIONS), 0, len(PROJECTIONS)),
        "lora_fused": flag,
    },
    required=tuple(field.name for field in fields(GptModel))[:19],
    is_open=True,
)


_PROBABILITY = number(0, 1)
_FACTOR = number(0, 1e6, optional=True)
SETTINGS: Mapping[str, Any] = {
    **dict.fromkeys(("seq_length", "max_position_embeddings", "moe_min_capacity"), _SIZE),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "moe_router_jitter"), _PROBABILITY),
    **dict.fromkeys(("moe_train_capacity_factor", "moe_eval_capacity_factor"), _FACTOR),
    **dict.fromkeys(("moe_aux_loss_coeff", "moe_z_loss_coeff", "init_method_std"), number(0, 1e6)),
    "moe_token_dropping": flag,
}
"""Fields of ModelConfig that are no part of the model but of how it is trained, each with its check: `model_settings`
in a ucp.json's `common`."""


def sound_settings(values: Any) -> dict[str, Any]:
    """Those of them that are there and can be."""
    values = values if isinstance(values, Mapping) else {}
    return {key: values[key] for key, check in SETTINGS.items() if key in values and passes(check, values[key])}


def group_of(name: str, shape: tuple[int, ...]) -> str:
    """The optimizer's group that a run puts the parameter in, where no flag asks for others: matrices decay, biases and
    norms do not, experts are apart. As model/build.py has it."""
    is_expert = ".mlp.experts." in name
    is_decayed = len(shape) - is_expert > 1
    if is_expert:
        return "experts" if is_decayed else "experts_no_decay"
    return "decay" if is_decayed else "no_decay"


def layouts(model: GptModel) -> dict[str, Layout]:
    """By canonical name, in the model's order. The vocabulary has no padding."""
    return dict(_layouts(model))


def _layouts(model: GptModel) -> Iterator[tuple[str, Layout]]:
    hidden, vocabulary = model.hidden_size, Layout.shard_v((model.vocab_size, model.hidden_size))
    yield "embedding.word_embeddings.weight", vocabulary
    if model.positions == "learned_absolute":
        yield "embedding.position_embeddings.weight", Layout.replicate((model.max_position_embeddings or 0, hidden))
    if model.embed_layernorm:
        yield from _norm(model, "embedding.norm", hidden)
    for layer in range(model.num_layers):
        for name, layout in _with_adapters(model, _block(model, model.num_experts_of(layer))):
            yield f"layers.{layer}.{name}", layout
    yield from _norm(model, "final_norm", hidden)
    if model.untie_embeddings_and_output_weights:
        yield "lm_head.weight", vocabulary
        if model.add_output_layer_bias:
            yield "lm_head.bias", Layout.shard_v((model.vocab_size,))


def _block(model: GptModel, num_experts: int) -> Iterator[tuple[str, Layout]]:
    hidden = model.hidden_size
    yield from _norm(model, "input_norm", hidden)
    yield from _attention(model)
    yield from _norm(model, "post_attention_norm", hidden)
    if num_experts == 1:
        yield from _mlp(model, "mlp", model.ffn_hidden_size)
        return
    yield "mlp.router.weight", Layout.replicate((num_experts, hidden))
    yield from _experts(model, num_experts, model.moe_ffn_hidden_size or 0)
    if model.moe_shared_expert_intermediate_size:
        yield from _mlp(model, "mlp.shared_expert", model.moe_shared_expert_intermediate_size)


def _with_adapters(model: GptModel, block: Iterator[tuple[str, Layout]]) -> Iterator[tuple[str, Layout]]:
    """Each matrix's two after its weight and bias."""
    for module, group in itertools.groupby(block, key=lambda item: item[0].rpartition(".")[0]):
        members = list(group)
        yield from members
        chosen = chosen_parts(module, model.lora_projections, model.swiglu)
        if not any(chosen):
            continue
        out_size, in_size = members[0][1].shape
        (cut,) = members[0][1].cuts
        if cut.dim == 0:
            made = column_layouts(model.lora_rank, in_size, cut.parts, chosen, model.lora_fused)
        else:
            made = row_layouts(model.lora_rank, in_size, out_size, cut.parts[0].unit)
        yield from zip((f"{module}.{kind}" for kind in KINDS), made, strict=True)


def _norm(model: GptModel, name: str, size: int) -> Iterator[tuple[str, Layout]]:
    yield f"{name}.weight", Layout.replicate((size,))
    if model.normalization == "layernorm":
        yield f"{name}.bias", Layout.replicate((size,))


def _attention(model: GptModel) -> Iterator[tuple[str, Layout]]:
    """Key/value heads are whole; more ranks than heads cut their rows, and then the run declares it."""
    hidden, head = model.hidden_size, model.kv_channels
    group = head * (model.num_attention_heads // model.num_key_value_heads)
    q, kv = model.num_attention_heads * head, Part(model.num_key_value_heads * head, unit=head)
    parts = Part(q, unit=group), kv, kv
    rows = q + 2 * kv.size
    yield "attention.query_key_value.weight", Layout.shard_nc((rows, hidden), 0, parts)
    if model.has_qkv_bias:
        yield "attention.query_key_value.bias", Layout.shard_nc((rows,), 0, parts)
    yield "attention.dense.weight", Layout.shard_h((hidden, q), unit=group)
    if model.has_attention_output_bias:
        yield "attention.dense.bias", Layout.replicate((hidden,))
    if model.qk_layernorm:
        yield "attention.query_norm.weight", Layout.replicate((head,))
        yield "attention.key_norm.weight", Layout.replicate((head,))


def _mlp(model: GptModel, name: str, ffn: int) -> Iterator[tuple[str, Layout]]:
    hidden = model.hidden_size
    yield f"{name}.dense_h_to_4h.weight", _up(model, ffn, (hidden,))
    if model.add_bias_linear:
        yield f"{name}.dense_h_to_4h.bias", _up(model, ffn, ())
    yield f"{name}.dense_4h_to_h.weight", Layout.shard_h((hidden, ffn))
    if model.add_bias_linear:
        yield f"{name}.dense_4h_to_h.bias", Layout.replicate((hidden,))


def _up(model: GptModel, ffn: int, columns: tuple[int, ...]) -> Layout:
    if model.swiglu:
        return Layout.shard_nc((2 * ffn, *columns), 0, (Part(ffn), Part(ffn)))
    return Layout.shard_v((ffn, *columns))


def _experts(model: GptModel, count: int, ffn: int) -> Iterator[tuple[str, Layout]]:
    hidden = model.hidden_size
    up = (Part(ffn), Part(ffn)) if model.swiglu else (Part(ffn),)
    width = sum(part.size for part in up)

    def matrix(shape: tuple[int, ...], dim: int, parts: tuple[Part, ...]) -> Layout:
        return Layout.shard_hy(shape, (Cut(0, (Part(count),), "ep"), Cut(dim, parts, "tp")))

    yield "mlp.experts.dense_h_to_4h", matrix((count, width, hidden), 1, up)
    yield "mlp.experts.dense_4h_to_h", matrix((count, hidden, ffn), 2, (Part(ffn),))
    if model.add_bias_linear:
        yield "mlp.experts.bias_h_to_4h", matrix((count, width), 1, up)
        yield "mlp.experts.bias_4h_to_h", matrix((count, hidden), 1, (Part(hidden),))
