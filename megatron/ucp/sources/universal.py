"""Source: a universal folder, ours or one that DeepSpeed's own converter wrote.

Every (parameter, state) is one file with the whole atomic tensor, so a piece is that tensor. What a
folder without a ucp.json holds is found out by foreign/universal.py.

    source = UniversalSource(folder, read_manifest(folder))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.ucp.errors import CorruptFileError, MissingFileError, SourceError
from megatron.ucp.file_table import require_listed
from megatron.ucp.manifest import Manifest, ParameterInfo
from megatron.ucp.runs import whole_runs
from megatron.ucp.sources.source import FileCache, Piece, listed_beside
from megatron.ucp.stored import StoredTensor

OPTIMIZER_FILE = "zero/optimizer_state.pt"


class UniversalSource:
    def __init__(self, folder: str | Path, manifest: Manifest, cache: FileCache | None = None):
        self.folder, self.manifest = Path(folder), manifest
        self._cache = cache or FileCache()
        missing = [
            path.relative_to(self.folder).as_posix()
            for name, info in manifest.parameters.items()
            for state in info.states
            if not (path := self._file(name, state)).is_file()
        ]
        if missing:
            raise MissingFileError(f"{len(missing)} file(s) are missing", found=missing, where=folder)

    def step(self, name: str) -> float | None:
        return self._info(name, "fp32").step

    def pieces(self, name: str, state: str) -> list[Piece]:
        layout = self._info(name, state).layout_of(state)
        return [Piece(self._file(name, state), ("param",), whole_runs(layout.numel))]

    def tensor(self, piece: Piece) -> StoredTensor:
        flat = self._cache.tensor(piece.file, piece.key)
        if flat.numel() != piece.runs[-1, 1] + piece.runs[-1, 2]:
            raise CorruptFileError(
                "wrong number of elements", found=flat.numel(), expected=int(piece.runs[-1, 2]), where=piece.file
            )
        return flat

    def step_object(self, name: str) -> Any:
        path = self.folder / "zero" / name / "step.pt"
        if not path.exists():
            return None
        require_listed(self.folder, self.manifest, [f"zero/{name}/step.pt"])
        return self._cache.load(path)

    def side_files(self) -> dict[str, Any]:
        paths = [self.folder / OPTIMIZER_FILE, *self.folder.glob("mp_rank_*_model_states.pt")]
        names = sorted(p.relative_to(self.folder).as_posix() for p in paths if p.exists())
        require_listed(self.folder, self.manifest, names)
        return {name: self._cache.load(self.folder / name) for name in names}

    def other_files(self) -> dict[str, Path]:
        return listed_beside(self.folder, self.manifest)

    def _file(self, name: str, state: str) -> Path:
        return self.folder / "zero" / name / f"{state}.pt"

    def _info(self, name: str, state: str) -> ParameterInfo:
        info = self.manifest.parameters.get(name)
        if info is None or state not in info.states:
            raise SourceError(
                f"the checkpoint holds no {state} of {name}",
                expected=self.manifest.parameters if info is None else info.states,
                where=self.folder,
            )
        return info
