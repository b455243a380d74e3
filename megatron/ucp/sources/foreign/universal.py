"""Source: universal folders without a ucp.json, written by DeepSpeed's own converter.

Names, states and shapes are taken from the folder. ZeRO-0 to 2 left tensors with their shapes. ZeRO-3
left bare, flat ones: their shapes (`param_shapes`) and their step are in files that the converter copies beside them.

    source = open_foreign_universal(Path("run/global_step100_universal"))

Source of these conventions: deepspeed/checkpoint/ds_to_universal.py (merge_tp_slices, merge_zero3_slices,
_save_optimizer_state_stage3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.ucp.errors import CorruptFileError, MissingFileError, UnsupportedCheckpointError, listed
from megatron.ucp.layout import Layout
from megatron.ucp.manifest import Manifest, OptimizerInfo, ParameterInfo
from megatron.ucp.runs import whole_runs
from megatron.ucp.sources.foreign.param_groups import group_values, names_or_numbers
from megatron.ucp.sources.foreign.save import NO_MANIFEST, common_from_model_states
from megatron.ucp.sources.optimizer_file import OptimizerFile
from megatron.ucp.sources.source import FileCache, Piece
from megatron.ucp.sources.universal import OPTIMIZER_FILE, UniversalSource
from megatron.ucp.stored import is_tensor
from megatron.ucp.topology import Topology

STAGE3_MODEL = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def open_foreign_universal(folder: Path) -> UniversalSource:
    """Of any ZeRO stage; each file is opened once. Raises MissingFileError, CorruptFileError or
    UnsupportedCheckpointError."""
    cache = FileCache()
    tables = {path.name: cache.load(path / "fp32.pt") for path in _parameter_folders(folder)}
    bare = [name for name, content in tables.items() if is_tensor(content)]
    if bare and len(bare) == len(tables):
        return _Stage3Source(folder, cache)
    if odd := [n for n, content in tables.items() if not isinstance(content, Mapping) or "param" not in content]:
        raise CorruptFileError(
            f"{len(odd)} file(s) are no parameter's of a universal folder",
            found=[f"zero/{name}/fp32.pt" for name in odd],
            where=folder,
            do="use another checkpoint",
        )
    return UniversalSource(folder, _manifest(folder, cache.load), cache)


def _manifest(folder: Path, load: Callable[[Path], Any]) -> Manifest:
    """Of ZeRO-0 to 2."""
    parameters = {}
    for path in _parameter_folders(folder):
        step = load(path / "step.pt") if (path / "step.pt").is_file() else None
        parameters[path.name] = ParameterInfo(
            layout=Layout.unique(load(path / "fp32.pt")["param"].shape),
            states=_states_in(path),
            step=None if step is None else float(step),
        )
    state_file = folder / OPTIMIZER_FILE
    groups = load(state_file).get("param_groups", []) if state_file.is_file() else []
    models = sorted(folder.glob("mp_rank_*_model_states.pt"))
    return _without_checksums(parameters, groups, load(models[0]) if models else {})


class _Stage3Source(UniversalSource):
    """Bare tensors. Their step is kept once, for all."""

    def __init__(self, folder: Path, cache: FileCache):
        model, state = (folder / name for name in (STAGE3_MODEL, OPTIMIZER_FILE))
        if missing := [path.name for path in (model, state) if not path.is_file()]:
            raise MissingFileError(
                "a universal folder of ZeRO-3 keeps its parameters' shapes and steps in files that are not there",
                found=missing,
                where=folder,
                do="copy them from where it was converted, or convert the checkpoint that it was made from",
            )
        self._model = cache.load(model)
        # The converter keeps one file's, and puts the values of the groups beside it.
        self._optimizer = OptimizerFile(state, cache.load(state), is_stage3=True)
        shapes = {name: tuple(shape) for table in self._model["param_shapes"] for name, shape in table.items()}
        folders = _parameter_folders(folder)
        if self._model.get("frozen_param_shapes"):
            raise UnsupportedCheckpointError(
                "DeepSpeed's converter leaves frozen parameters of ZeRO-3 out of the universal folder",
                found=list(self._model["frozen_param_shapes"]),
                where=folder,
                do="convert the checkpoint that it was made from, with tools/ds_to_universal.py",
            )
        if differing := set(shapes) ^ {path.name for path in folders}:
            raise CorruptFileError(
                f"the folder and {STAGE3_MODEL} hold different parameters", found=differing, where=folder
            )
        self._step = _one_step(self._optimizer.states(), folder)
        step = None if self._step is None else float(self._step)
        parameters = {p.name: ParameterInfo(Layout.unique(shapes[p.name]), "", _states_in(p), step) for p in folders}
        groups = self._optimizer.content["param_groups"]
        super().__init__(folder, _without_checksums(parameters, groups, self._model), cache)

    def pieces(self, name: str, state: str) -> list[Piece]:
        numel = math.prod(self._info(name, state).layout.shape)
        return [Piece(self._file(name, state), (), whole_runs(numel))]

    def step_object(self, name: str) -> Any:
        return self._step

    def side_files(self) -> dict[str, Any]:
        model = {**self._model, "module": {}, "optimizer": None, "frozen_param_fragments": None}
        optimizer = self._optimizer.of_no_parameter()
        # ZeRO-3 keeps it in the model states only; ZeRO-1 and 2 will not load an optimizer's without it.
        optimizer.setdefault("ds_version", model.get("ds_version"))
        return {"mp_rank_00_model_states.pt": model, OPTIMIZER_FILE: optimizer}


def _one_step(states: Iterable[Mapping[str, Any]], folder: Path) -> Any:
    steps = [state["step"] for state in states if state.get("step") is not None]
    if len(counts := {float(step) for step in steps}) > 1:
        raise UnsupportedCheckpointError(
            "the optimizer counted its parameters' steps apart, and the folder does not say which is whose",
            found=f"steps {listed(counts)}",
            where=folder,
            do="convert the checkpoint that it was made from, with tools/ds_to_universal.py",
        )
    return steps[0] if steps else None


def _without_checksums(
    parameters: dict[str, ParameterInfo], groups: Sequence[Mapping[str, Any]], model: Mapping[str, Any]
) -> Manifest:
    """`groups`: torch's. `model`: model states, which say how far the run had come; or nothing."""
    return Manifest(
        kind="universal",
        topology=Topology(),
        parameters=parameters,
        optimizer=OptimizerInfo(kind="", groups=dict(zip(names_or_numbers(groups), map(group_values, groups)))),
        common=common_from_model_states(model),
        unverified=NO_MANIFEST,
    )


def _parameter_folders(folder: Path) -> list[Path]:
    """Raises MissingFileError for one without fp32.pt."""
    found = sorted(path for path in (folder / "zero").iterdir() if path.is_dir())
    if lacking := [path.name for path in found if not (path / "fp32.pt").is_file()]:
        raise MissingFileError(f"{len(lacking)} parameter(s) without fp32.pt", found=lacking, where=folder / "zero")
    return found


def _states_in(folder: Path) -> tuple[str, ...]:
    """Of a parameter's folder, "fp32" first."""
    return tuple(sorted((p.stem for p in folder.glob("*.pt") if p.stem != "step"), key=lambda s: (s != "fp32", s)))
