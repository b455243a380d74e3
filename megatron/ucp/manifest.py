"""ucp.json: what a checkpoint folder holds, in typed form.

Everything that is not a tensor is in one JSON file, written last, without which the folder is not a
checkpoint. Native saves (DeepSpeed's own files beside it) and universal folders have the same manifest.

    manifest = read_manifest(folder)
    manifest.parameters["final_norm.weight"].layout
    write_manifest(folder, dataclasses.replace(manifest, digests=digests))

Nothing of a file is believed before its checksum and its schema (manifest_schema.py) hold. Fields: see the dataclasses;
FORMAT.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron.ucp.errors import ManifestError, NotACheckpointError, listed
from megatron.ucp.layout import Layout
from megatron.ucp.manifest_schema import manifest_faults
from megatron.ucp.safe_paths import open_file
from megatron.ucp.topology import Topology

LEFT_OUT = "left_out"
"""In `common`: the digest of frozen weights that are not in the files (DeepSpeed's exclude_frozen_parameters)."""
MANIFEST_NAME = "ucp.json"
FORMAT_VERSION = 2
MAX_BYTES = 512 << 20
"""Of ucp.json; the largest models need a tenth of it."""
_NO_CHECKSUM = "0" * 64


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
    unverified: str = ""
    """Why the digests do not prove that this is what was once saved: what it was made from had no checksums. Empty for
    a save, and for what was converted from one whose checksums held."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.kind not in ("native", "universal"):
            raise ManifestError("unknown kind of checkpoint", found=self.kind, expected=["native", "universal"])

    @property
    def iteration(self) -> int | None:
        return self.common.get("iteration")

    @property
    def doubt(self) -> str:
        """Why soundness is not proof that this is what was once saved; empty where it is."""
        if self.unverified:
            return self.unverified
        if not self.digests or not self.files:
            return "it carries no digests or checksums to compare with"
        if self.format_version < 2:
            return "its ucp.json is of format version 1, which has no checksum of its own"
        return ""

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
            "unverified",
        )
        return {
            "format_version": self.format_version,
            "checksum": _NO_CHECKSUM,
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
    def from_json(cls, data: Any, where: object = None) -> Manifest:
        """Raises ManifestError with all that is wrong."""
        version = data.get("format_version") if isinstance(data, dict) else None
        if isinstance(version, bool) or version not in (1, FORMAT_VERSION):
            raise ManifestError(
                "unknown format_version",
                found=repr(version)[:60],
                expected=f"1 or {FORMAT_VERSION}",
                where=where,
                do="read it with the version of megatron.ucp that wrote it",
            )
        if faults := manifest_faults(data):
            raise ManifestError(
                f"{MANIFEST_NAME} is not what the format asks for: {len(faults)} fault(s)",
                found=listed(faults),
                where=where,
                do="the file is damaged or no manifest of this format (megatron/ucp/FORMAT.md): use another checkpoint",
            )
        # Fields may be added within a version; one that an older writer did not know has its default.
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        known["topology"] = Topology.from_json(data["topology"])
        known["optimizer"] = OptimizerInfo(**data["optimizer"])
        known["files"] = {path: FileInfo(**info) for path, info in data["files"].items()}
        known["parameters"] = {name: _parameter(info) for name, info in data["parameters"].items()}
        return cls(**known)

    def require_sound(self, where: object) -> None:
        """For what was worked out from a folder without a ucp.json: its names and sizes are a stranger's too. Raises
        ManifestError."""
        content = self.to_json()
        if not _is_unicode(content):
            raise ManifestError(
                "what the files say of themselves is not Unicode", where=where, do="use another checkpoint"
            )
        faults = manifest_faults(json.loads(json.dumps(content)))
        if faults:
            raise ManifestError(
                f"what the files say of themselves cannot be: {len(faults)} fault(s)",
                found=listed(faults),
                where=where,
                do="use another checkpoint, or save it again with other names",
            )


def left_out(manifest: Manifest) -> Mapping[str, Any] | None:
    """What the manifest says of frozen weights that are not in the files; None where none are missing: it still says so
    where another program's checkpoint was converted together with its base."""
    told = manifest.common.get(LEFT_OUT)
    return told if told and all(info.is_trainable for info in manifest.parameters.values()) else None


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
    """Raises NotACheckpointError without a ucp.json, ManifestError for one that cannot be believed."""
    path = Path(folder) / MANIFEST_NAME
    return parse_manifest(read_manifest_bytes(folder), path)


def read_manifest_bytes(folder: str | Path) -> bytes:
    """Of ucp.json, not yet believed. Raises NotACheckpointError, ManifestError or UnsafePathError."""
    path = Path(folder) / MANIFEST_NAME
    if not os.path.lexists(path):
        raise NotACheckpointError(
            f"no {MANIFEST_NAME} in the folder", where=folder, do="give a folder that a save or a conversion completed"
        )
    with open_file(folder, MANIFEST_NAME) as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ManifestError(f"longer than {MAX_BYTES >> 20} MiB", where=path, do="it is no manifest: use another")
    return raw


def parse_manifest(raw: bytes, where: Path) -> Manifest:
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ManifestError("nested too deep", where=where, do=_USE_ANOTHER) from None
    except ValueError as error:
        raise ManifestError(f"not JSON: {error}"[:400], where=where, do=_USE_ANOTHER) from error
    if b"\\ud" in raw.lower() and not _is_unicode(data):
        raise ManifestError("not Unicode: half of a surrogate pair", where=where, do=_USE_ANOTHER)
    if isinstance(data, dict) and "checksum" in data:
        _check_checksum(raw, data["checksum"], where)
    return Manifest.from_json(data, where=where)


_USE_ANOTHER = "the file is damaged: use another checkpoint"


def _is_unicode(data: Any) -> bool:
    """JSON can write what no text holds ("\\ud83d"), and what nobody can print then."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {double[:80]!r} is there twice")
    return found


def _check_checksum(raw: bytes, written: Any, where: Path) -> None:
    """The SHA-256 of the file with these 64 digits as zeros."""
    if not isinstance(written, str) or len(written) != len(_NO_CHECKSUM) or not written.isascii():
        return  # the schema says so
    digits = written.encode()
    found = hashlib.sha256(raw.replace(digits, _NO_CHECKSUM.encode(), 1)).hexdigest()
    if raw.count(digits) != 1 or found != written:
        raise ManifestError(
            f"{MANIFEST_NAME} was changed since it was written: its checksum differs",
            found=found,
            expected=written,
            where=where,
            do="copy it again from where it was saved, or use another checkpoint",
        )


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """`Manifest.to_json`'s object as the bytes of a ucp.json, its checksum filled in."""
    text = json.dumps({**content, "checksum": _NO_CHECKSUM}, indent=1, allow_nan=True) + "\n"
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(f'"checksum": "{_NO_CHECKSUM}"', f'"checksum": "{checksum}"', 1).encode()


def write_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Writes ucp.json and flushes it to disk; the last file of a folder."""
    path = Path(folder) / MANIFEST_NAME
    with open(path, "wb") as file:
        file.write(manifest_bytes(manifest.to_json()))
        file.flush()
        os.fsync(file.fileno())
    return path
