"""config.json of Hugging Face's in our words, and back.

described = describe(config)                      # of a parsed config.json; never raises for what is in it
described.family, described.model, described.faults, described.notes
config = config_of(family, model, dtype="bfloat16", max_positions=4096)
mismatches(family, model)                         # why a model cannot be written so; empty where it can

A value that is left out has transformers' default. What would make the model compute something else than ours is a
fault; what does not matter for sequences up to a length is a note. Source: transformers 5.23, configuration_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.huggingface.families import FAMILIES, Family
from megatron.ucp.huggingface.rotary_json import read_rotary, rotary_config, rotary_mismatches
from megatron.ucp.json_checks import shown
from megatron.ucp.naming.gpt_model import GptModel, sound_settings

_GELUS = {
    "gelu_new": False, "gelu_pytorch_tanh": False, "gelu_fast": False, "gelu": True, "gelu_python": True
}  # fmt: skip
"""transformers' names (activations.py), and whether each is by the error function. The first of a kind is written."""


@dataclass(frozen=True)
class Described:
    family: Family | None
    model: GptModel | None
    """None where there are faults."""
    settings: Mapping[str, Any]
    """How it is trained, by our names (gpt_model.SETTINGS), as far as the config says it."""
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def describe(config: Mapping[str, Any]) -> Described:
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        known = f"known are {', '.join(sorted(FAMILIES))}"
        return Described(None, None, {}, (f"model_type {shown(config.get('model_type'))}: {known}",))
    reading = _Reading(family, config)
    values = reading.values()
    model = None
    if not reading.faults:
        try:
            model = GptModel.of(values)
            reading.faults += model.faults() or mismatches(family, model)
        except UnsupportedCheckpointError as error:
            reading.faults += error.found if isinstance(error.found, list) else [str(error.found)]
    return Described(
        family,
        None if reading.faults else model,
        sound_settings(reading.settings()),
        tuple(reading.faults),
        tuple(reading.notes),
    )


class _Reading:
    """Of one config.json."""

    def __init__(self, family: Family, config: Mapping[str, Any]):
        self.family, self.config = family, config
        self.faults: list[str] = []
        self.notes: list[str] = [f"{family.model_type}: {family.differs}"] if family.differs else []

    def get(self, key: str) -> Any:
        return self.config.get(key, self.family.defaults.get(key))

    def values(self) -> dict[str, Any]:
        """GptModel's, as far as they are sound."""
        family = self.family
        values = {**family.fixed, **{name: self.get(key) for name, key in family.keys.items()}}
        values["untie_embeddings_and_output_weights"] = not self.get("tie_word_embeddings")
        self._check_expected()
        self._derive(values)
        values |= self._biases()
        if family.gelu:
            values["exact_gelu"] = self._is_exact_gelu()
        if values["positions"] == "rope":
            values |= self._rope()
        if family.has_experts:
            values |= self._experts(values)
        return values

    def settings(self) -> dict[str, Any]:
        """Where it says nothing of dropout, there is none."""
        length = self.family.keys.get("max_position_embeddings", "max_position_embeddings")
        found = {"max_position_embeddings": self.get(length)}
        for ours, gpt2s in (("hidden_dropout", "resid_pdrop"), ("attention_dropout", "attn_pdrop")):
            found[ours] = self.config.get(ours, self.get(gpt2s) or 0.0)
        return found

    def _check_expected(self) -> None:
        for key, allowed in self.family.expected.items():
            value = self.config.get(key, self.family.defaults.get(key, allowed[0]))
            if value not in allowed:
                self.faults.append(f"{key} {shown(value)}: only {' or '.join(map(repr, allowed))} is computed here")
        if self.config.get("quantization_config"):
            self.faults.append("quantization_config: its weights are quantised; take the model before quantisation")
        window = self.get("sliding_window")
        if window is not None and self.config.get("use_sliding_window", "sliding_window" in self.family.defaults):
            self.notes.append(
                f"sliding_window {shown(window)}: attention here reaches over the whole sequence, the same up to "
                "samples of that length"
            )
        kinds = self.config.get("layer_types")
        if isinstance(kinds, list) and (other := {str(kind) for kind in kinds} - {"full_attention"}):
            self.faults.append(f"layer_types {sorted(other)}: only full_attention is computed here")

    def _derive(self, values: dict[str, Any]) -> None:
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in (hidden, heads)):
            return  # GptModel says so
        if values.get("ffn_hidden_size") is None:
            values["ffn_hidden_size"] = 4 * hidden
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
        if values.get("kv_channels") is None:
            values["kv_channels"] = hidden // heads
            if hidden % heads:
                self.faults.append(
                    f"hidden size {hidden} is not a multiple of {heads} heads, and head_dim is not given"
                )

    def _biases(self) -> dict[str, bool]:
        kind = self.family.biases
        if kind == "flags":
            attention, *of_mlp = (bool(self.get(key)) for key in self.family.bias_flags)
            is_everywhere = attention and any(of_mlp)
            if any(of_mlp) and not attention:
                self.faults.append("mlp_bias without attention_bias: biases in the MLP alone are not computed here")
            return _bias_fields(is_everywhere, attention, attention)
        return _bias_fields(kind == "all", kind in ("all", "qkv"), kind == "all")

    def _is_exact_gelu(self) -> bool:
        name = self.get(self.family.gelu)
        if not isinstance(name, str) or name not in _GELUS:
            self.faults.append(f"{self.family.gelu} {shown(name)}: known are {', '.join(_GELUS)}")
            return False
        return _GELUS[name]

    def _rope(self) -> dict[str, Any]:
        values, faults = read_rotary(self.config, self.family)
        self.faults += faults
        return values

    def _experts(self, values: Mapping[str, Any]) -> dict[str, Any]:
        keys = ("num_local_experts", "num_experts")
        told = [table.get(key) for table in (self.config, self.family.defaults) for key in keys]
        count: Any = next((number for number in told if number is not None), None)
        layers, step = values["num_layers"], 1
        dense: Any = []
        if "decoder_sparse_step" in self.family.defaults:
            step, dense = self.get("decoder_sparse_step"), self.get("mlp_only_layers") or []
        numbers = (count, layers, step)
        if any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 1 << 16 for n in numbers):
            self.faults.append(f"experts {shown(count)} in every {shown(step)} of {shown(layers)} blocks: no numbers")
            return {}
        if not isinstance(dense, list) or count == 1:
            self.faults.append(f"mlp_only_layers {shown(dense)}, {count} experts: no mixture that is computed here")
            return {}
        of_layers = [count if (i + 1) % step == 0 and i not in dense else 1 for i in range(layers)]
        if max(of_layers) == 1:
            self.faults.append(f"decoder_sparse_step {step}, mlp_only_layers {shown(dense)}: no block has experts")
        if values.get("topk") == 1 and values.get("moe_normalize_topk"):
            self.faults.append("one expert a token whose score is divided by itself is not computed here")
        width = values.get("moe_ffn_hidden_size", values.get("ffn_hidden_size"))
        return {"num_experts": of_layers, "moe_ffn_hidden_size": width}


def _bias_fields(is_everywhere: bool, of_qkv: bool, of_output: bool) -> dict[str, bool]:
    return {"add_bias_linear": is_everywhere, "has_qkv_bias": of_qkv, "has_attention_output_bias": of_output}


def mismatches(family: Family, model: GptModel) -> list[str]:
    """Why the model cannot be one of this family."""
    found = [
        f"{name} is {getattr(model, name)!r}, not {value!r}"
        for name, value in family.fixed.items()
        if getattr(model, name) != value and (model.has_experts or not name.startswith("moe_"))
    ]
    if model.has_experts != family.has_experts:
        found.append("it has experts" if model.has_experts else "it has no experts")
    if "num_key_value_heads" not in family.keys and model.num_key_value_heads != model.num_attention_heads:
        found.append(f"{model.num_attention_heads} query heads share {model.num_key_value_heads} keys")
    if not family.cuts_heads and model.kv_channels * model.num_attention_heads != model.hidden_size:
        found.append(f"a head is {model.kv_channels} wide, not hidden size / heads")
    if "ffn_hidden_size" not in family.keys and model.ffn_hidden_size != 4 * model.hidden_size:
        found.append(f"its MLP is {model.ffn_hidden_size} wide, not 4 x hidden size")
    if model.exact_gelu and not family.gelu:
        found.append("its GELU is exact")
    if model.lora_rank and (fault := _adapter_mismatch(family, model)):
        found.append(fault)
    found += _bias_mismatches(family, model)
    if model.positions == "rope":
        found += rotary_mismatches(family, model)
    if family.has_experts and model.has_experts:
        found += _expert_mismatches(family, model)
    return found


def _adapter_mismatch(family: Family, model: GptModel) -> str:
    """Several matrices of ours in one of theirs have one adapter there."""
    is_fused = len(family.block["attention.query_key_value"].modules) == 1
    several = {"q_proj", "k_proj", "v_proj"} | ({"gate_proj", "up_proj"} if model.swiglu else set())
    if is_fused == model.lora_fused or not several & set(model.lora_projections):
        return ""
    return f"q, k and v have {'one adapter' if model.lora_fused else 'an adapter each'}"


def _bias_mismatches(family: Family, model: GptModel) -> list[str]:
    ours = model.add_bias_linear, model.has_qkv_bias, model.has_attention_output_bias
    possible = {
        "none": [(False, False, False)],
        "qkv": [(False, True, False)],
        "all": [(True, True, True)],
        "flags": [(False, False, False), (False, True, True), *([(True, True, True)] if family.bias_flags[1:] else [])],
    }[family.biases]
    return [] if ours in possible else [f"biases of all, q|k|v, attention's output: {ours}, not {possible}"]


def _expert_mismatches(family: Family, model: GptModel) -> list[str]:
    found = []
    counts = set(model.num_experts)
    can_mix = "decoder_sparse_step" in family.defaults
    if len(counts - {1}) > 1 or (1 in counts and not can_mix):
        found.append(f"blocks have {sorted(counts)} experts, not all the same number")
    if "moe_ffn_hidden_size" not in family.keys and 1 in counts and model.moe_ffn_hidden_size != model.ffn_hidden_size:
        found.append("experts are of another width than the MLP")
    if model.topk == 1 and model.moe_normalize_topk:
        found.append("a token's one expert counts by its score")
    return found


def family_of(model: GptModel, wanted: str | None = None) -> Family:
    """The one (of those, if `wanted` does not name it) that the model is of. Raises UnsupportedCheckpointError with the
    reasons against each."""
    candidates = [family for name, family in FAMILIES.items() if wanted in (None, name)]
    if not candidates:
        raise UnsupportedCheckpointError("no such family of models", found=wanted, expected=sorted(FAMILIES))
    reasons = {family.model_type: mismatches(family, model) for family in candidates}
    fitting = [family for family in candidates if not reasons[family.model_type]]
    if fitting:
        return fitting[0]
    nearest = sorted(reasons, key=lambda name: len(reasons[name]))
    raise UnsupportedCheckpointError(
        "no architecture of Hugging Face's that is known here computes what this model computes",
        found=[f"{name}: {'; '.join(reasons[name])}" for name in nearest],
        do="the nearest ones say what keeps the model from being one of them; train it with other flags",
    )


def config_of(family: Family, model: GptModel, dtype: str, max_positions: int) -> dict[str, Any]:
    """A whole config.json. `dtype`: torch's name of the weights' type; `max_positions`: of a model without a position
    table, the longest sequence that it is meant for. The model must be one of the family."""
    values = {f.name: getattr(model, f.name) for f in fields(model)}
    if family.has_experts and "moe_ffn_hidden_size" not in family.keys:
        values["ffn_hidden_size"] = model.moe_ffn_hidden_size
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: values[name] for name, key in family.keys.items()},
        **{key: allowed[0] for key, allowed in family.expected.items()},
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
    }
    if family.gelu:
        config[family.gelu] = next(name for name, is_exact in _GELUS.items() if is_exact == model.exact_gelu)
    if family.biases == "flags":
        config |= dict(zip(family.bias_flags, (model.has_qkv_bias, model.add_bias_linear)))
    if model.positions == "rope":
        config |= rotary_config(family, model)
    if "max_position_embeddings" in family.defaults:
        config["max_position_embeddings"] = max_positions
    if family.has_experts:
        config |= _experts_config(family, model)
    if "sliding_window" in family.defaults:
        config["sliding_window"] = None
    return config


def _experts_config(family: Family, model: GptModel) -> dict[str, Any]:
    count = max(model.num_experts)
    if "decoder_sparse_step" not in family.defaults:
        return {"num_local_experts": count}
    dense = [layer for layer, number in enumerate(model.num_experts) if number == 1]
    return {"num_experts": count, "decoder_sparse_step": 1, "mlp_only_layers": dense}
