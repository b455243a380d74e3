"""ucp.json: what a checkpoint folder holds, in typed form.

The one idea: everything that is not a tensor is in one JSON file, written last, without which the folder is not a
checkpoint. Native saves (DeepSpeed's own files beside it) and universal folders have the same manifest.

    manifest = read_manifest(folder)
    manifest.parameters["final_norm.weight"].layout
    write_manifest(folder, replace(manifest, digests=digests))

Fields: see the dataclasses; FORMAT.md is the specification.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron.ucp.errors import ManifestError, NotACheckpointError
from megatron.ucp.layout import Layout
from megatron.ucp.topology import Topology

MANIFEST_NAME = "ucp.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ParameterInfo:
    layout: Layout
    """Under the topology that wrote the folder (its vocabulary padding included)."""
    group: str = ""
    """Name of the optimizer's parameter group; empty for a frozen parameter."""
    states: tuple[str, ...] = ("fp32",)
    """"fp32" first, then the optimizer's own tensors: "exp_avg", ..."""
    step: float | None = None
    scalars: dict[str, float] = field(default_factory=dict)
    """Other numbers that the optimizer keeps for the parameter, by its own names (NAdam's "mu_product")."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of those states whose shape is not the parameter's (Adafactor's "row_var"): they are never cut."""
    pp_stages: tuple[int, ...] = (0,)
    """Stages that hold a copy; more than one for tied weights. The lowest is the one that counts."""
    is_trainable: bool = True
    dtype: str = "float32"
    """Of the weights in forward and backward."""

    def layout_of(self, state: str) -> Layout:
        return Layout.unique(self.shapes[state]) if state in self.shapes else self.layout


@dataclass(frozen=True)
class OptimizerInfo:
    kind: str = "AdamW"
    """Class name of the optimizer that steps: "AdamW", "FusedAdam", ..."""
    wrapper: str = ""
    """Class name of DeepSpeed's wrapper, empty where there is none (ZeRO-0, fp32)."""
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Hyper-parameters (lr, betas, weight_decay, ...) by group name."""


@dataclass(frozen=True)
class FileInfo:
    bytes: int
    crc32: str
    """Eight hexadecimal digits, zlib's CRC-32 of the whole file."""


@dataclass(frozen=True)
class Manifest:
    kind: str
    """"native" or "universal"."""
    topology: Topology
    parameters: dict[str, ParameterInfo]
    zero_stage: int = 0
    is_pipelined: bool = False
    optimizer: OptimizerInfo = OptimizerInfo()
    model: dict[str, Any] = field(default_factory=dict)
    """Configuration values that must be equal for another run to load this."""
    common: dict[str, Any] = field(default_factory=dict)
    """iteration, consumed_train_samples, scheduler, loss_scaler, ...: the state that belongs to no parameter."""
    digests: dict[str, dict[str, str]] = field(default_factory=dict)
    """parameter -> state -> Digest.hex()."""
    expert_digests: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """parameter of experts -> state -> Digest.hex() of each expert; their sum is in `digests`. They say which expert is
    wrong where a digest is."""
    files: dict[str, FileInfo] = field(default_factory=dict)
    """By path relative to the folder, "/" between parts; all files but ucp.json."""
    zero0_order: list[list[str]] = field(default_factory=list)
    """Native ZeRO-0 only: for each mp_rank (pp_rank * tp_size + tp_rank), the canonical names of the parameters in
    the order of torch's optimizer state indices (all groups, one after the other), because
    mp_rank_XX_model_states.pt keeps the optimizer's state by index."""
    zero3_order: list[list[list[str]]] = field(default_factory=list)
    """Native ZeRO-3 only: for each mp_rank, for each sub-group of the optimizer, the names of its parameters in order.
    Each takes ceil(shard elements / zero ranks) elements of every rank's flat tensor, the last ranks' padded."""
    fragments: dict[str, list[list[int]]] = field(default_factory=dict)
    """Native ZeRO-1 and 2 only, and optional: by parameter, [mp_rank, zero rank, group, first element in the flat
    tensor, elements] of each file that holds a part of it, by ascending ranks. It saves a reader from opening every
    file to find out which ones it needs."""
    pipeline_layers: list[str | None] = field(default_factory=list)
    """Native pipelines only: for each index XX of the files layer_XX-model_YY-model_states.pt the prefix that makes
    their names canonical ("embedding", "layers.0", ...); None where a layer has no file. The ZeRO-0 weights are read
    through it. A tied weight is listed under the layer that first holds it."""
    saved_by: dict[str, str] = field(default_factory=dict)
    """framework, version, deepspeed, torch."""
    source: dict[str, Any] | None = None
    """Universal only: what it was converted from (folder name, topology, zero_stage, is_pipelined)."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.kind not in ("native", "universal"):
            raise ManifestError("unknown kind of checkpoint", found=self.kind, expected=["native", "universal"])

    @property
    def iteration(self) -> int | None:
        return self.common.get("iteration")

    @property
    def is_partitioned(self) -> bool:
        """Native: optimizer files hold ZeRO's flat partitions. (BF16_Optimizer writes them at stage 0 too.)"""
        return not self.zero0_order

    def to_json(self) -> dict[str, Any]:
        plain = (
            "kind",
            "zero_stage",
            "is_pipelined",
            "model",
            "common",
            "digests",
            "expert_digests",
            "zero0_order",
            "zero3_order",
            "fragments",
            "pipeline_layers",
            "saved_by",
            "source",
        )
        return {
            "format_version": self.format_version,
            **{name: getattr(self, name) for name in plain},
            "topology": self.topology.to_json(),
            "optimizer": asdict(self.optimizer),
            "parameters": {
                name: {
                    **{f.name: getattr(info, f.name) for f in fields(info) if f.name != "layout"},
                    "layout": info.layout.to_json(),
                }
                for name, info in self.parameters.items()
            },
            "files": {path: asdict(info) for path, info in self.files.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], where: object = None) -> Manifest:
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise ManifestError(
                "unknown format_version",
                found=version,
                expected=FORMAT_VERSION,
                where=where,
                do="read it with the version of megatron.ucp that wrote it",
            )
        # Fields may be added within a version; one that an older writer did not know has its default.
        missing = [name for name in _REQUIRED if name not in data]
        if missing:
            raise ManifestError(
                "fields are missing", found=missing, where=where, do="the file is damaged: use another checkpoint"
            )
        try:
            known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
            known["topology"] = Topology.from_json(data["topology"])
            known["optimizer"] = OptimizerInfo(**data["optimizer"])
            known["files"] = {path: FileInfo(**info) for path, info in data["files"].items()}
            known["parameters"] = {name: _parameter(info) for name, info in data["parameters"].items()}
            return cls(**known)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ManifestError(f"malformed manifest ({type(error).__name__}: {error})", where=where) from error


_REQUIRED = ("kind", "topology", "parameters", "zero_stage", "is_pipelined", "optimizer", "common", "digests", "files")


def _parameter(data: dict[str, Any]) -> ParameterInfo:
    return ParameterInfo(
        **{
            **data,
            "layout": Layout.from_json(data["layout"]),
            "states": tuple(data["states"]),
            "shapes": {state: tuple(shape) for state, shape in data.get("shapes", {}).items()},
            "pp_stages": tuple(data["pp_stages"]),
        }
    )


def read_manifest(folder: str | Path) -> Manifest:
    """Raises NotACheckpointError without a ucp.json, ManifestError for one that cannot be understood."""
    path = Path(folder) / MANIFEST_NAME
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise NotACheckpointError(
            f"no {MANIFEST_NAME} in the folder",
            where=folder,
            do="give a folder that a save or a conversion completed",
        ) from None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"not JSON: {error}", where=path) from error
    return Manifest.from_json(data, where=path)


def write_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Writes ucp.json and flushes it to disk; the last file of a folder."""
    path = Path(folder) / MANIFEST_NAME
    text = json.dumps(manifest.to_json(), indent=1, allow_nan=True)
    with open(path, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    return path
