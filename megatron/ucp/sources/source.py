"""What every Source is: a folder that answers "where do the bytes of this parameter's state lie?"

An answer is a list of pieces, and a piece is a flat tensor in a file plus runs. Reading (execute.py),
converting, comparing and verifying are written once against this and know no file format.

    source = open_source("checkpoints/global_step100")
    for piece in source.pieces("final_norm.weight", "exp_avg"): ...
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.ucp.errors import CorruptFileError
from megatron.ucp.manifest import Manifest
from megatron.ucp.ordinary_file import read_content
from megatron.ucp.runs import Runs
from megatron.ucp.stored import StoredTensor, as_stored, is_tensor


@dataclass(frozen=True, eq=False)
class Piece:
    file: Path
    key: tuple[str | int, ...]
    """Path to the tensor inside the file's nested dicts and lists."""
    runs: Runs
    offset: int = 0
    """A run's local_start counts from this element of the flattened tensor."""
    copy: int = 0
    """0: the pieces with 0 tile the parameter exactly once. Others are replicas of parts of it, numbered by who
    holds them; for an averaged parameter (Partial) each number is one whole, different, copy."""


class Source(Protocol):
    folder: Path
    manifest: Manifest

    def pieces(self, name: str, state: str) -> list[Piece]:
        """All pieces, replicas included. Raises SourceError for an unknown name or state."""

    def step(self, name: str) -> float | None:
        """How many steps the optimizer took for this parameter; None where it keeps no such count."""

    def tensor(self, piece: Piece) -> StoredTensor:
        """The flat tensor that holds the piece, where it lies."""

    def step_object(self, name: str) -> Any:
        """The step as the optimizer keeps it (a tensor or an int), or None."""

    def side_files(self) -> dict[str, Any]:
        """What DeepSpeed's universal loader wants beside the parameters, by relative path: the optimizer's state
        that belongs to no parameter, and the model state files without their tensors."""

    def other_files(self) -> dict[str, Path]:
        """Files that come along as they are (random streams; a tokenizer's), by the path that they get."""


def listed_beside(folder: Path, manifest: Manifest) -> dict[str, Path]:
    """A listed folder's files that are no `.pt` files."""
    paths = {name: folder / name for name in manifest.files if not name.endswith(".pt")}
    return {name: path for name, path in paths.items() if path.is_file()}


def _no_state(value: Any) -> str | None:
    """Why these values cannot be copied element by element; None where they can."""
    if not is_tensor(value):
        return type(value).__name__
    return str(value.dtype) if value.is_complex() or str(value.dtype) == "torch.bool" else None


class FileCache:
    """Opened files by path. Tensors in them are memory-mapped, so what stays is structure, not data."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._lock = threading.Lock()

    def load(self, path: Path) -> Any:
        with self._lock:
            if path not in self._open:
                self._open[path] = read_content(path)
            return self._open[path]

    def tensor(self, path: Path, key: tuple[str | int, ...]) -> StoredTensor:
        """Flat. Raises CorruptFileError where there is none that can be a state."""
        node = self.load(path)
        try:
            for part in key:
                node = node[part]
            if fault := _no_state(node):
                raise CorruptFileError(
                    "not a tensor that can be a state",
                    found=f"{' / '.join(map(str, key))}: {fault}",
                    expected="a dense tensor of real numbers",
                    where=path,
                    do="use another checkpoint",
                )
            node = as_stored(node)
            held = node.storage.num_bytes
            if held < node.numel() * node.element_size() or held > path.stat().st_size:
                raise CorruptFileError(
                    "a tensor claims more than the file holds",
                    found=f"{' / '.join(map(str, key))}: {tuple(node.shape)} with strides {node.stride()}",
                    where=path,
                    do="use another checkpoint",
                )
            return node.flat()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CorruptFileError(
                "the file lacks a tensor that it should hold", expected=" / ".join(map(str, key)), where=path
            ) from error
