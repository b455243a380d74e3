"""--use-checkpoint-args: the model's flags out of the checkpoint that a run starts from.

notes = fill_in_from_checkpoint(values, {"load": "SmolLM2-135M"})     # values of the model section, in place
model_values(manifest.model, where)                                   # ModelConfig's fields; raises ConfigError
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError, Problem
from megatron.ucp.errors import UcpError
from megatron.ucp.huggingface.config_json import describe
from megatron.ucp.huggingface.folder import CONFIG, is_model_folder, read_json
from megatron.ucp.manifest import MANIFEST_NAME, Manifest, read_manifest
from megatron.ucp.naming.gpt_model import OF_SCALING, GptModel, sound_settings
from megatron.ucp.run_folder import find_checkpoints

_FLAG = "--use-checkpoint-args"
_SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_key_value_heads", "kv_channels",
    "vocab_size", "normalization", "layernorm_epsilon", "swiglu", "exact_gelu", "untie_embeddings_and_output_weights",
    "add_bias_linear", "qk_layernorm", "embed_layernorm", "use_parallel_residual", "add_output_layer_bias",
)  # fmt: skip
_OF_ROPE = ("rope_theta", "rotary_percent", "rope_scaling_type")
_OF_EXPERTS = (
    "topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_score_function",
    "moe_normalize_topk", "moe_sparsemixer_eps",
)  # fmt: skip
_OF_POSITIONS = {"position_embedding_type", "use_rotary_position_embeddings", "add_position_embedding"}
_OF_BIASES = {"add_bias_linear", "add_qkv_bias", "add_attention_bias"}


def fill_in_from_checkpoint(values: dict[str, Any], checkpoint: Mapping[str, Any]) -> list[str]:
    """What no flag gives of the model section, in place; `checkpoint`: that section's values. Returns notes. Raises
    ConfigError where there is no checkpoint, or one that does not say of which model it is."""
    folders = [Path(checkpoint[key]) for key in ("load", "pretrained_checkpoint") if checkpoint.get(key)]
    try:
        found = next((described for folder in folders if (described := _described(folder))), None)
    except (UcpError, OSError) as error:
        raise ConfigError(Problem(f"{_FLAG}: the checkpoint cannot be read", str(error), flags=(_FLAG,))) from error
    if found is None:
        raise ConfigError(
            Problem(
                f"{_FLAG} without a checkpoint to take them from",
                found=f"nothing in {' or '.join(map(str, folders))}" if folders else "neither flag is given",
                expected="--load or --pretrained-checkpoint with a checkpoint, or a model folder of Hugging Face's",
                flags=(_FLAG,),
            )
        )
    where, model, settings = found
    known = {**settings, **model_values(model, where)}
    for together in (_OF_POSITIONS, _OF_BIASES):
        if together & values.keys():
            known = {field: value for field, value in known.items() if field not in together}
    added = {field: value for field, value in known.items() if field not in values}
    values.update(added)
    shown = ", ".join(f"{field} {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for field, v in added.items())
    return [f"{_FLAG}: {where} sets {shown}"]


def _described(folder: Path) -> tuple[Path, GptModel, dict[str, Any]] | None:
    """(the checkpoint, its model, its settings); None where nothing is there yet."""
    if not folder.is_dir():
        return None
    if is_model_folder(folder) and not (folder / MANIFEST_NAME).is_file():
        described = describe(read_json(folder, CONFIG))
        if described.model is None:
            fix = "give the flags of a model that is known, or take another folder"
            raise ConfigError(Problem(f"{_FLAG}: {folder / CONFIG}", "; ".join(described.faults), "", (_FLAG,), fix))
        return folder, described.model, dict(described.settings)
    found = find_checkpoints(folder)
    chosen = found.native or found.universal
    if chosen is None:
        return None
    manifest: Manifest = chosen.opened.source.manifest if chosen.opened else read_manifest(chosen.folder)
    settings = sound_settings(manifest.common.get("model_settings"))
    return chosen.folder, GptModel.of(manifest.model, chosen.folder), settings


def model_values(model: GptModel, where: object) -> dict[str, Any]:
    """Fields of ModelConfig. Raises ConfigError for experts in blocks that no --expert-interval names."""
    values: dict[str, Any] = {name: getattr(model, name) for name in _SAME}
    if model.positions == "none":
        values["add_position_embedding"] = False
    else:
        values["position_embedding_type"] = model.positions
    if model.positions == "learned_absolute":
        values["max_position_embeddings"] = model.max_position_embeddings
    if model.positions == "rope":
        values |= {name: getattr(model, name) for name in (*_OF_ROPE, *OF_SCALING[model.rope_scaling_type])}
    if not model.add_bias_linear and model.has_attention_output_bias:
        values["add_attention_bias"] = True
    elif not model.add_bias_linear and model.has_qkv_bias:
        values["add_qkv_bias"] = True
    if model.lora_rank:
        values |= {"lora_rank": model.lora_rank, "lora_alpha": model.lora_alpha, "lora_fused": model.lora_fused}
        values["lora_target_modules"] = model.lora_projections
    if model.has_experts:
        interval, counts = _interval(model.num_experts, where)
        values |= {"num_experts": counts, "expert_interval": interval}
        values |= {name: getattr(model, name) for name in _OF_EXPERTS}
    return values


def _interval(counts: Sequence[int], where: object) -> tuple[int, tuple[int, ...]]:
    """(--expert-interval, --num-experts) of each block's number."""
    with_experts = [layer for layer, count in enumerate(counts) if count > 1]
    interval = with_experts[0] + 1
    if with_experts != list(range(interval - 1, len(counts), interval)):
        raise ConfigError(
            Problem(
                f"{_FLAG}: experts in blocks that are not every so many",
                found=f"blocks {with_experts} of {len(counts)} in {where}",
                expected="the last of every --expert-interval blocks",
                flags=("--expert-interval",),
            )
        )
    numbers = tuple(counts[layer] for layer in with_experts)
    return interval, numbers[:1] if len(set(numbers)) == 1 else numbers
