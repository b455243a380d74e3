"""Source: a Hugging Face model folder, its weights read where they lie in .safetensors or pytorch_model.bin.

It has one state, "fp32", in whatever precision it was written, and no optimizer: what starts from it
starts a fresh one. A parameter of ours is put together from theirs by the table of its architecture, so a rank of any
topology reads just the slices that it keeps.

    source = HuggingFaceSource.open("SmolLM2-135M")
    source.pieces("layers.0.attention.query_key_value.weight", "fp32")        # q, k and v
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.ucp.errors import SourceError, UnsupportedCheckpointError
from megatron.ucp.huggingface.adapter import AdapterFolder
from megatron.ucp.huggingface.config_json import describe
from megatron.ucp.huggingface.folder import CONFIG, HeldTensor, ModelFolder, companions, file_of
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.naming.gpt_model import GptModel, layouts
from megatron.ucp.naming.matching import match
from megatron.ucp.naming.tensors import Pair
from megatron.ucp.sources.source import Piece
from megatron.ucp.stored import StoredTensor, are_equal
from megatron.ucp.topology import Topology

log = logging.getLogger(__name__)

_MASTER = "fp32"
_FLOATS = ("float32", "bfloat16", "float16", "float64")


class HuggingFaceSource:
    def __init__(
        self,
        folder: ModelFolder,
        model: GptModel,
        held: dict[str, list[tuple[Pair, HeldTensor]]],
        settings: Mapping[str, Any],
    ):
        """`held`: their tensors, by our parameters."""
        self.folder, self._held = folder.path, held
        self._tensors = {(of.file, pair.name): (pair, of.tensor) for each in held.values() for pair, of in each}
        self._kept = threading.local()
        """The transposed tensor that this thread read last: it is asked for stretch by stretch."""
        self.manifest = Manifest(
            kind="universal",
            topology=Topology(),
            parameters={
                name: ParameterInfo(layout=layout, dtype=held[name][0][1].tensor.dtype.name)
                for name, layout in layouts(model).items()
            },
            optimizer=OptimizerInfo(kind=""),
            model=model.to_json(),
            common={"model_settings": dict(settings)},
            saved_by={"format": f"model folder of Hugging Face's, {folder.config['model_type']}"},
            unverified="a Hugging Face folder has no checksums",
        )

    @classmethod
    def open(cls, folder: str | Path, adapter: str | Path | None = None) -> HuggingFaceSource:
        """`adapter`: a folder of PEFT's adapters of this model, which it then has. Raises UnsupportedCheckpointError
        with all at once that is not as a known architecture has it, and what reading the files raises."""
        opened = ModelFolder.open(Path(folder))
        described = describe(opened.config)
        if described.family is None or described.model is None:
            raise _refused(opened.path, list(described.faults))
        model, tensors, notes = described.model, dict(opened.tensors), list(described.notes)
        if adapter is not None:
            adapters = AdapterFolder.open(Path(adapter))
            model = adapters.adapted(model, described.family)
            tensors |= adapters.tensors
            notes += adapters.notes
        matched = match(described.family, model, {name: held.tensor.shape for name, held in tensors.items()})
        held = {ours: [(pair, tensors[name]) for pair, name in p] for ours, p in matched.by_parameter.items()}
        faults = matched.faults + [
            f"{name} is {tensors[name].tensor.dtype.name}: quantised weights are not read"
            for parts in matched.by_parameter.values()
            for _, name in parts
            if tensors[name].tensor.dtype.name not in _FLOATS
        ]
        embedding = held.get("embedding.word_embeddings.weight")
        if matched.tied and embedding and not are_equal(tensors[matched.tied].tensor, embedding[0][1].tensor):
            faults.append(
                f"{matched.tied} is not {embedding[0][0].name}, and config.json says that they are one: set "
                '"tie_word_embeddings": false there if they are not'
            )
        if faults:
            raise _refused(opened.path, sorted(faults))
        for note in notes:
            log.warning("warning: %s: %s", opened.path.name, note)
        return cls(opened, model, held, described.settings)

    def pieces(self, name: str, state: str) -> list[Piece]:
        if name not in self._held or state != _MASTER:
            raise SourceError(
                f"the checkpoint holds no {state} of {name}",
                expected=self.manifest.parameters if name not in self._held else [_MASTER],
                where=self.folder,
            )
        return [Piece(held.file, (pair.name,), pair.runs) for pair, held in self._held[name]]

    def tensor(self, piece: Piece) -> StoredTensor:
        pair, tensor = self._tensors[piece.file, str(piece.key[0])]
        if not pair.is_transposed:
            return tensor.flat()
        if getattr(self._kept, "pair", None) is not pair:
            self._kept.pair, self._kept.tensor = pair, None  # the one before goes first
            self._kept.tensor = _transposed(tensor).flat()
        return self._kept.tensor

    def step(self, name: str) -> float | None:
        return None

    def step_object(self, name: str) -> Any:
        return None

    def side_files(self) -> dict[str, Any]:
        return {}

    def other_files(self) -> dict[str, Path]:
        return {name: file_of(self.folder, name) for name in [CONFIG, *companions(self.folder)]}


def _transposed(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(tensor.dtype, tensor.shape[::-1], tensor.strides[::-1], tensor.offset, tensor.storage)


def _refused(folder: Path, faults: Sequence[str]) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"this model cannot be taken over: {len(faults)} reason(s)",
        found=list(faults),
        where=folder,
        do="see docs/migration.md for what is known of each architecture; nothing was written",
    )
