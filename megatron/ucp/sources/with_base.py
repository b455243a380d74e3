"""Source: a checkpoint that leaves out its frozen weights, with those of its base.

A run with --exclude-frozen-parameters saves so, and what Trainer or another DeepSpeed program saves of a PEFT model
mostly is so: that comes under our names, with moments and steps. A save with ucp.json says by digest which base it was,
and another one is refused.

    source = with_left_out(open_source("runs/a/global_step100"), base=open_source("SmolLM2-135M"))
    source = with_adapters_of(open_source("checkpoint-500"), like="SmolLM2-135M", adapter="checkpoint-500")
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.ucp.digest import digest_runs, total
from megatron.ucp.errors import DigestMismatchError, UnsupportedCheckpointError
from megatron.ucp.execute import gather
from megatron.ucp.huggingface.adapter import CONFIG as ADAPTER_CONFIG
from megatron.ucp.huggingface.adapter import AdapterFolder
from megatron.ucp.huggingface.config_json import describe
from megatron.ucp.huggingface.families import Family
from megatron.ucp.huggingface.folder import CONFIG, read_json
from megatron.ucp.manifest import LEFT_OUT, ParameterInfo, left_out
from megatron.ucp.naming.adapters import PEFT, is_adapter
from megatron.ucp.naming.gpt_model import GptModel, layouts
from megatron.ucp.naming.tensors import pairs
from megatron.ucp.runs import whole_runs
from megatron.ucp.sources.huggingface import HuggingFaceSource
from megatron.ucp.sources.renamed import RenamedSource, beside
from megatron.ucp.sources.source import Piece, Source
from megatron.ucp.stored import StoredTensor, in_order

log = logging.getLogger(__name__)
_MASTER = "fp32"
_LORA = re.compile(r"(base_model\.model\..+\.lora_[AB])\.\w+\.weight")
_BASE_LAYER = re.compile(r"base_model\.model\.(.+)\.base_layer\.(weight|bias)")


class WithBase:
    def __init__(self, inner: Source, base: Source, names: Iterable[str]):
        """`names`: of all parameters, in their order. What `inner` lacks is `base`'s, and is not trained."""
        self.folder, self._inner, self._base = inner.folder, inner, base
        held, beside = inner.manifest.parameters, base.manifest.parameters
        parameters = {name: held[name] if name in held else _frozen(beside[name]) for name in names}
        self.left_out = left_out(inner.manifest)
        """What the inner checkpoint says of the weights that it does not hold."""
        common = {key: value for key, value in inner.manifest.common.items() if key != LEFT_OUT}
        self.manifest = replace(inner.manifest, parameters=parameters, common=common)
        self._base_files = {
            piece.file for name in parameters if name not in held for piece in base.pieces(name, _MASTER)
        }

    def _part(self, name: str) -> Source:
        return self._base if name not in self._inner.manifest.parameters else self._inner

    def pieces(self, name: str, state: str) -> list[Piece]:
        return self._part(name).pieces(name, state)

    def tensor(self, piece: Piece) -> StoredTensor:
        return (self._base if piece.file in self._base_files else self._inner).tensor(piece)

    def step(self, name: str) -> float | None:
        return self._part(name).step(name)

    def step_object(self, name: str) -> Any:
        return self._part(name).step_object(name)

    def side_files(self) -> dict[str, Any]:
        return {}

    def other_files(self) -> dict[str, Path]:
        return self._inner.other_files()


def _frozen(info: ParameterInfo) -> ParameterInfo:
    return replace(info, group="", states=(_MASTER,), step=None, scalars={}, shapes={}, is_trainable=False)


def with_left_out(inner: Source, base: Source) -> Source:
    """`inner` leaves out its frozen weights: with those of `base`, under the same names. Whether they are
    the same is for whoever reads them to see, by the digest that is told. Raises UnsupportedCheckpointError where the
    base leaves some out itself."""
    if left_out(base.manifest):
        raise UnsupportedCheckpointError(
            "the base leaves out its frozen weights itself",
            where=base.folder,
            do="give the model that it was trained from",
        )
    held, beside = inner.manifest.parameters, base.manifest.parameters
    return WithBase(inner, base, [*held, *(name for name in beside if name not in held)])


def left_out_of(source: Source) -> Mapping[str, Any] | None:
    """What the checkpoint says of its frozen weights, where these are another one's."""
    return source.left_out if isinstance(source, WithBase) else None


def is_of_peft(source: Source) -> bool:
    """By the names of its parameters."""
    return any(_LORA.fullmatch(name) for name in source.manifest.parameters)


def with_adapters_of(inner: Source, like: str | Path, adapter: str | Path | None = None) -> Source:
    """`like`: the base's model folder; `adapter`: where adapter_config.json is, by default the checkpoint's folder or
    the one around it, as Trainer saves it. Raises UnsupportedCheckpointError with all that does not fit, and
    DigestMismatchError where the base is another one."""
    like, around = Path(like), (inner.folder, inner.folder.parent)
    folder = Path(adapter) if adapter else next((path for path in around if (path / ADAPTER_CONFIG).is_file()), None)
    if folder is None:
        raise UnsupportedCheckpointError(
            f"the checkpoint is of a PEFT model, and {ADAPTER_CONFIG} is not beside it",
            where=inner.folder,
            do="give the folder that has it with --adapter: alpha is in no other file",
        )
    described = describe(read_json(like, CONFIG))
    if described.family is None or described.model is None:
        raise UnsupportedCheckpointError("no base that is known", found=list(described.faults), where=like)
    family, model = described.family, AdapterFolder.open(folder).adapted(described.model, described.family)
    names = inner.manifest.parameters
    called = {name: _called(name) for name in names}
    is_whole = any(not _LORA.fullmatch(name) for name in names)
    given = inner, family, model, described.settings, beside(like), called
    if is_whole:
        return RenamedSource.of(*given)
    adapters = RenamedSource.of(*given, only_adapters=True)
    base = HuggingFaceSource.open(like)
    _require_base(inner, base, family, model)
    return WithBase(adapters, base, layouts(model))


def _called(name: str) -> str:
    """Without what PEFT puts around a name."""
    if match := _LORA.fullmatch(name):
        return f"{match[1]}.weight"
    if match := _BASE_LAYER.fullmatch(name):
        return f"{match[1]}.{match[2]}"
    return name.removeprefix(PEFT)


def _require_base(inner: Source, base: HuggingFaceSource, family: Family, model: GptModel) -> None:
    """Where the save says which it was: by the names that its parameters had."""
    told = inner.manifest.common.get(LEFT_OUT)
    told = told.get("digest") if isinstance(told, dict) else None
    kinds = {info.dtype.removeprefix("torch.") for info in inner.manifest.parameters.values()}
    if told is None or kinds != {"float32"}:  # in another precision its weights were rounded
        log.warning("warning: %s: whether the adapters were trained beside this base is not checked", inner.folder)
        return
    adapted = {_module(pair.name) for pair in pairs(family, model) if is_adapter(pair.ours)}
    digests: dict[str, dict[str, str]] = {}
    for pair in pairs(family, replace(model, lora_rank=0, lora_projections=())):
        numel = math.prod(pair.shape)
        values = np.empty(numel, dtype=np.float32)
        gather(base, pair.ours, _MASTER, base.pieces(pair.ours, _MASTER), pair.runs, values)
        if pair.is_transposed:
            values = in_order(values.reshape(pair.shape[::-1]).T).reshape(-1)
        module, _, kind = pair.name.rpartition(".")
        name = f"{PEFT}{module}.base_layer.{kind}" if module in adapted else PEFT + pair.name
        digest = digest_runs(values, whole_runs(numel), name=name, state=_MASTER, shape=pair.shape)
        digests[name] = {_MASTER: digest.hex()}
    if (found := total(digests)) != told:
        raise DigestMismatchError(
            "these adapters were trained beside another base model",
            found=f"weights with digest {found}",
            expected=told,
            where=base.folder,
            do="give the folder of the model that the program loaded",
        )


def _module(name: str) -> str:
    """Of an adapter's tensor: the module that it is beside."""
    return name.removeprefix(PEFT).rpartition(".lora_")[0]
