"""A folder of PEFT's LoRA adapters, both ways: adapter_config.json, adapter_model.safetensors, and which base it is of.

adapter = AdapterFolder.open("adapter")             # raises UnsupportedCheckpointError with all that is not known here
model = adapter.adapted(base, family)               # the base's GptModel with adapters
adapter_config(family, model, base="SmolLM2-135M")  # what PEFT reads

What is in it decides: every matrix that has an adapter has one in every block. ucp_base.json, which PEFT does not look
at, has the digest of the weights that the adapters were trained beside. Source: PEFT 0.21.2, tuners/lora/config.py and
utils/save_and_load.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.ucp.digest import total
from megatron.ucp.errors import DigestMismatchError, NotACheckpointError, UnsupportedCheckpointError
from megatron.ucp.huggingface.families import Family
from megatron.ucp.huggingface.folder import HeldTensor, read_json, tensors_of
from megatron.ucp.json_checks import number, passes, record, shown, text, whole
from megatron.ucp.manifest import Manifest, left_out
from megatron.ucp.naming.adapters import PARTS, PEFT, PROJECTIONS, is_adapter, parts_of
from megatron.ucp.naming.gpt_model import GptModel

_MASTER = "fp32"
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
BASE = "ucp_base.json"
_FREE = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type",
)  # fmt: skip
"""Keys that change nothing of what the adapters compute, or are looked at one by one. Another one must say nothing."""
_PATTERNS = ("rank_pattern", "alpha_pattern")
_NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {}, 0)
_BASE_CHECK = record({"digest": text, "dtype": text}, required=("digest", "dtype"), is_open=True)


@dataclass(frozen=True)
class AdapterFolder:
    path: Path
    rank: int
    alpha: float
    tensors: Mapping[str, HeldTensor]
    base_digest: str | None
    """Of the base's weights in fp32, where the folder says it."""
    base_dtype: str | None
    notes: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> AdapterFolder:
        if not (path / CONFIG).is_file():
            raise NotACheckpointError(
                "no folder of PEFT's", found=f"no {CONFIG}", where=path, do="give what save_pretrained of PEFT wrote"
            )
        config = read_json(path, CONFIG)
        faults = _config_faults(config)
        base = read_json(path, BASE) if os.path.lexists(path / BASE) else None
        if base is not None and not passes(_BASE_CHECK, base):
            faults.append(f"{BASE} does not say of which base it is")
        if faults:
            raise UnsupportedCheckpointError(
                f"these adapters cannot be taken over: {len(faults)} reason(s)", found=sorted(faults), where=path
            )
        name = next((name for name in WEIGHTS if os.path.lexists(path / name)), WEIGHTS[0])
        tensors = tensors_of(path, name)
        notes = []
        if config.get("lora_dropout"):
            notes.append(f"lora_dropout {shown(config['lora_dropout'])}: adapters are trained without dropout here")
        if base is None:
            notes.append("the folder does not say by digest which base it is of: that it is this one is not checked")
        digest, dtype = (base["digest"], base["dtype"]) if base else (None, None)
        return cls(path, config["r"], float(config["lora_alpha"]), tensors, digest, dtype, tuple(notes))

    def adapted(self, base: GptModel, family: Family) -> GptModel:
        """The base with these adapters. Whether their shapes are right, and all are there, is for who reads them."""
        block = re.escape(f"{PEFT}{family.prefix}{family.layers}").replace(re.escape("{}"), r"\d{1,6}")
        module = re.compile(block + r"([\w.]{1,200}?)\.lora_[AB]\.weight")
        modules = {match[1] for name in self.tensors if (match := module.fullmatch(name))}
        projections = set[str]()
        is_fused = False
        for ours, entry in family.block.items():
            parts = parts_of(ours, base.swiglu)
            there = [module in modules for module in entry.modules]
            if len(entry.modules) == len(parts):
                projections |= {name for name, is_there in zip(parts, there, strict=True) if is_there}
            elif parts and there[0]:
                projections |= set(parts)
                is_fused = True
        chosen = tuple(name for name in PROJECTIONS if name in projections)
        if not chosen:
            raise UnsupportedCheckpointError(
                "no adapter of a matrix that is known here",
                found=sorted(modules) or sorted(self.tensors)[:20],
                expected=[module for ours, entry in family.block.items() if ours in PARTS for module in entry.modules],
                where=self.path,
            )
        return dataclasses.replace(
            base, lora_rank=self.rank, lora_alpha=self.alpha, lora_projections=chosen, lora_fused=is_fused
        )

    def require_base(self, manifest: Manifest) -> str | None:
        """Is the rest of a model that has these adapters the base that they were trained beside? By digest. Returns a
        warning where it cannot be told. Raises DigestMismatchError."""
        if self.base_digest is None:
            return None
        there = base_told(manifest)
        if there["digest"] == self.base_digest:
            return None
        if there["dtype"] != self.base_dtype:
            return (
                f"the adapters were trained beside weights in {self.base_dtype}, and these are in {there['dtype']}: "
                "that they are the same is not checked"
            )
        raise DigestMismatchError(
            "these adapters are of another base model",
            found=f"weights with digest {there['digest']}",
            expected=self.base_digest,
            where=self.path,
            do="give the folder of the model that the run with adapters started from",
        )


def base_told(manifest: Manifest) -> dict[str, str]:
    """The digest of all that is no adapter, and in which precision it was held."""
    if told := left_out(manifest):
        return {"digest": told["digest"], "dtype": told.get("dtype", "float32")}
    names = sorted(name for name in manifest.parameters if not is_adapter(name))
    if missing := [name for name in names if _MASTER not in manifest.digests.get(name, {})]:
        raise UnsupportedCheckpointError("the checkpoint has no digests of its base's weights", found=missing)
    kinds = sorted({manifest.parameters[name].dtype.removeprefix("torch.") for name in names})
    return {"digest": total({n: {_MASTER: manifest.digests[n][_MASTER]} for n in names}), "dtype": " ".join(kinds)}


def _config_faults(config: Mapping[str, Any]) -> list[str]:
    faults = []
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type {shown(config.get('peft_type'))}: LORA is known here")
    if not passes(whole(1, 1 << 16), config.get("r")):
        faults.append(f"r {shown(config.get('r'))}")
    if not passes(number(0, 1e6), config.get("lora_alpha")) or not config["lora_alpha"]:
        faults.append(f"lora_alpha {shown(config.get('lora_alpha'))}")
    faults += [
        f"{key} {shown(config[key])}: one for all matrices is known here" for key in _PATTERNS if config.get(key)
    ]
    start = config.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal", "eva"):
        faults.append(f"init_lora_weights {shown(start)}: it may have changed the base's weights")
    faults += [
        f"{key} {shown(value)}: not computed here"
        for key, value in config.items()
        if key not in _FREE and value not in _NEUTRAL
    ]
    return faults


def adapter_config(family: Family, model: GptModel, base: str | None) -> dict[str, Any]:
    """`base`: the name or the folder of the model that the adapters are of."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": model.lora_rank,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(entry.form == "transposed" for entry in family.block.values()),
        "target_modules": _target_modules(family, model),
    }


def _target_modules(family: Family, model: GptModel) -> list[str]:
    """Their last words, as PEFT has them, where a word does not stand for another matrix too."""
    wanted: list[str] = []
    others: list[str] = []
    for ours, entry in family.block.items():
        parts = parts_of(ours, model.swiglu)
        of_module = parts if len(entry.modules) == len(parts) else (parts[:1] or ("",)) * len(entry.modules)
        for module, part in zip(entry.modules, of_module, strict=True):
            (wanted if part in model.lora_projections else others).append(module)
    taken = {module.rpartition(".")[2] for module in others}
    words = {module: module.rpartition(".")[2] for module in wanted}
    return sorted({module if word in taken else word for module, word in words.items()})
