"""Sources without a ucp.json: folders that a stock DeepSpeed program saved, or DeepSpeed's own converter wrote.

universal.py                        a universal folder
dense.py, zero0.py                  ZeRO-1 to 3, and ZeRO-0
moe.py, moe_zero0.py                the same with experts of deepspeed.moe.layer.MoE
autoep.py                           ZeRO-1 to 3 with experts of AutoEP
save.py                             their files, all opened, and of one save

source = open_foreign(Path("run/global_step100"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.ucp.errors import CorruptFileError, UcpError
from megatron.ucp.sources.deepspeed_files import list_files
from megatron.ucp.sources.foreign.autoep import is_autoep, open_autoep
from megatron.ucp.sources.foreign.dense import open_dense
from megatron.ucp.sources.foreign.expert_files import has_experts
from megatron.ucp.sources.foreign.moe import open_moe
from megatron.ucp.sources.foreign.moe_zero0 import open_moe_zero0
from megatron.ucp.sources.foreign.universal import open_foreign_universal
from megatron.ucp.sources.foreign.zero0 import open_zero0
from megatron.ucp.sources.source import Source


def open_foreign(folder: Path, column_parallel: tuple[str, ...] = (), optimizer_order: Sequence[str] = ()) -> Source:
    """`column_parallel`: regular expressions for names of parameters that tensor parallelism cuts along dimension 0,
    where DeepSpeed's patterns do not say so. `optimizer_order`: names of the parameters in the order of the optimizer's
    groups, for ZeRO-0, whose files only number them. Raises, before any tensor is read, MissingFileError,
    CorruptFileError, SourceError (the files contradict each other) or UnsupportedCheckpointError."""
    try:
        source = _open(folder, column_parallel, optimizer_order)
        source.manifest.require_sound(folder)
        _require_readable(source)
    except UcpError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Without a ucp.json every value is looked up where DeepSpeed would have put it.
        raise CorruptFileError(
            f"the files are not as DeepSpeed writes them ({type(error).__name__}: {error})"[:400],
            where=folder,
            do="use another checkpoint",
        ) from error
    return source


def _open(folder: Path, column_parallel: tuple[str, ...], optimizer_order: Sequence[str]) -> Source:
    if (folder / "zero").is_dir():
        return open_foreign_universal(folder)
    found = list_files(folder)
    if is_autoep(found):
        return open_autoep(folder, found)
    if has_experts(folder):
        return open_moe(folder, column_parallel) if found.zeros else open_moe_zero0(folder)
    if found.models and not found.zeros:
        return open_zero0(folder, optimizer_order)
    return open_dense(folder, column_parallel)


def _require_readable(source: Source) -> None:
    """Every value that is going to be read is looked up once, and no element of a tensor read: without checksums a file
    may hold anything where DeepSpeed would have put it."""
    for name, info in source.manifest.parameters.items():
        for state in info.states:
            for piece in source.pieces(name, state):
                source.tensor(piece)
        source.step_object(name)
    source.side_files()
