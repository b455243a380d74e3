"""Place a checkpoint of any data-parallel size and ZeRO stage into a live DeepSpeed engine.

    path, client_state = load(engine, Path("run/global_step100"), LoadArguments())       # collective over the world

What DeepSpeed's own `load_checkpoint` restores is restored, from the same files, in the same order: weights, masters
and the optimizer's states; the groups' hyper-parameters; buffers; the learning-rate schedule; counters and the loss
scale.
Nothing is placed before every rank has opened the checkpoint and found that it fits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError, SourceMismatchError, all_ranks_or_none
from megatron.checkpoint.frozen_weights import place_frozen
from megatron.checkpoint.judging import is_trained_in, parameter_problems, state_problems
from megatron.checkpoint.opening import open_everywhere
from megatron.checkpoint.placing import place_states
from megatron.checkpoint.proof import prove
from megatron.checkpoint.state_digest import state_digests
from megatron.engine.counters import LOSS_SCALER_FIELDS, set_loss_scaler_state
from megatron.engine.engine_state import EngineState
from megatron.engine.protocols import ForeignEngine
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.ucp.digest import total
from megatron.ucp.errors import listed
from megatron.ucp.manifest import LEFT_OUT
from megatron.ucp.run_folder import OpenCheckpoint
from megatron.ucp.safe_load import load as load_file
from megatron.ucp.sources import Source
from megatron.ucp.sources.deepspeed_files import list_files
from megatron.ucp.sources.optimizer_file import OptimizerFile
from megatron.ucp.sources.source import FileCache
from megatron.ucp.stand_ins import without_strangers
from megatron.ucp.targets.native_target import ZeroSettings
from megatron.ucp_deepspeed.engine_view import engine_state

log = logging.getLogger(__name__)

_DEEPSPEEDS = (
    "module",
    "skipped_steps",
    "global_steps",
    "dp_world_size",
    "mp_world_size",
    "data_sampler",
    "random_ltd",
)
"""In the model states: what is not the program's own (deepspeed/runtime/engine.py, _load_checkpoint)."""


@dataclass(frozen=True)
class LoadArguments:
    """`load_checkpoint`'s arguments."""

    strict: bool = True
    """Every parameter and buffer of the module has to be in the checkpoint."""
    optimizer_states: bool = True
    schedule: bool = True
    module_only: bool = False

    @property
    def with_optimizer(self) -> bool:
        return self.optimizer_states and not self.module_only


def load(engine: ForeignEngine, folder: Path, wanted: LoadArguments) -> tuple[str, dict[str, Any]]:
    """Returns the path of the model states, and what the program had saved beside the engine's state.

    Collective over the world. Raises SourceMismatchError before anything is placed, CheckpointError on every rank
    where the checkpoint cannot be read or what was placed is not what was saved."""
    with all_ranks_or_none("opening", folder):
        order = [name for names in engine_state(engine).members for name in names]
        opened = OpenCheckpoint.of(folder, order)
    opened = open_everywhere(folder, opened)
    source = opened.source
    with all_ranks_or_none("opening", folder):
        path, content = _model_states(folder)
        state, left_out = _fitting_state(engine, source, wanted)
        groups = _groups(state, source) if wanted.with_optimizer else {}
    _require_same_base(engine, source, left_out)
    with all_ranks_or_none("loading", folder):
        place_states(state, source, wanted.with_optimizer)
        _, frozen = place_frozen(state, source)
        state.set_hyper_parameters(groups)
        opened.identity.require_unchanged()
    state.refresh_weights()
    with all_ranks_or_none("refreshing the weights from", folder):
        if stale := state.stale_weights():
            raise CheckpointError(f"live weights are not the masters that were placed: {listed(stale, 20)}")
    with reported_by_rank_0(torch.distributed.get_rank()):
        prove(state, source, with_optimizer=wanted.with_optimizer, kind=_kind(engine, source), frozen=frozen)
    with all_ranks_or_none("loading", folder):
        _load_buffers(engine, content, wanted.strict)
        _restore_counters(engine, state, opened, content, wanted)
    _tell_of_another_batch(engine, source, content)
    return str(path), _client_state(content, wanted)


def _tell_of_another_batch(engine: ForeignEngine, source: Source, content: Mapping[str, Any]) -> None:
    """Programs count steps, not samples."""
    saved = source.manifest.common.get("global_batch_size") or ZeroSettings.of(content).global_batch
    if saved and saved != engine.train_batch_size() and torch.distributed.get_rank() == 0:
        log.warning(
            "warning: %s was trained with %d samples a step, and %d are taken here: a program that counts steps sees "
            "samples twice, or not at all; keep micro batch x accumulation x ranks",
            *(source.folder, saved, engine.train_batch_size()),
        )


def _model_states(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """This rank's, which have its buffers, or where there are fewer the first's; tensors are memory-mapped."""
    models = list_files(folder).models
    rank = torch.distributed.get_rank()
    path = models.get((rank, 0)) or models[0, 0]
    return path, load_file(path)


def _fitting_state(engine: ForeignEngine, source: Source, wanted: LoadArguments) -> tuple[EngineState, list[str]]:
    """The engine's state, and the frozen parameters that the checkpoint leaves out. Raises SourceMismatchError with
    everything that does not fit."""
    state = engine_state(engine)
    left_out = [] if wanted.strict else sorted(state.frozen - set(source.manifest.parameters))
    if left_out:
        state = engine_state(engine, without=left_out)
    if wanted.with_optimizer:
        state.make_states()
    problems = parameter_problems(state.layouts, source)
    if not problems and wanted.with_optimizer:
        problems = state_problems(state, source) + state.hyper_parameter_faults(_groups(state, source))
    if problems:
        raise SourceMismatchError(
            f"{source.folder} does not fit this model; nothing was loaded:\n  " + "\n  ".join(problems)
        )
    return state, left_out


def _groups(state: EngineState, source: Source) -> dict[str, Mapping[str, Any]]:
    """Hyper-parameters of the checkpoint by the live groups' names. A group is found by its members: programs seldom
    name theirs, and one whose parameters are all frozen is in no file."""
    members: dict[int, list[str]] = {}
    for (index, _), names in zip(state.flats, state.members, strict=True):
        members.setdefault(index, []).extend(names)
    found: dict[str, Mapping[str, Any]] = {}
    for index, names in members.items():
        saved = {source.manifest.parameters[n].group for n in names if is_trained_in(source, n)}
        values = [source.manifest.optimizer.groups[group] for group in sorted(saved) if group]
        if any(other != values[0] for other in values[1:]):
            raise SourceMismatchError(
                f"parameters of the optimizer's group {index} are in groups {sorted(saved)} of {source.folder}, which "
                "have other hyper-parameters. Give the optimizer the groups that it was saved with."
            )
        if values:
            found[state.group_names[index]] = values[0]
    return found


def _require_same_base(engine: ForeignEngine, source: Source, left_out: list[str]) -> None:
    """A checkpoint without the frozen weights says by digest which they were. Collective over the world."""
    saved = source.manifest.common.get(LEFT_OUT)
    if not left_out:
        return
    if not saved:
        log.warning(
            "the checkpoint has no weights of %s, nor says which they were: as they are here", listed(left_out, 4)
        )
        return
    digests = state_digests(engine_state(engine))
    if (found := total({name: digests[name] for name in left_out})) != saved["digest"]:
        with reported_by_rank_0(torch.distributed.get_rank()):
            raise SourceMismatchError(
                f"{source.folder} was trained on another base model: its {len(left_out)} frozen parameters have digest "
                f"{found} here, and had {saved['digest']} (bf16 and fp16 weights differ from fp32 ones). Load the "
                "weights that it was trained on before you resume."
            )


def _kind(engine: ForeignEngine, source: Source) -> str:
    manifest = source.manifest
    is_same = (manifest.topology.dp_size, manifest.zero_stage) == (
        torch.distributed.get_world_size(),
        engine.zero_optimization_stage(),
    )
    return "native" if is_same else "direct"


def _load_buffers(engine: ForeignEngine, content: Mapping[str, Any], strict: bool) -> None:
    module = content.get("module") or {}
    buffers = {name: module[name] for name in content.get("buffer_names") or () if name in module}
    here = {name for name, _ in engine.module.named_buffers()} & set(engine.module.state_dict())
    if strict and (missing := sorted(here - set(buffers))):
        raise CheckpointError(f"buffers that the checkpoint lacks: {listed(missing, 20)}")
    engine.module.load_state_dict({name: value for name, value in buffers.items() if name in here}, strict=False)


def _restore_counters(
    engine: ForeignEngine, state: EngineState, opened: OpenCheckpoint, content: Mapping[str, Any], wanted: LoadArguments
) -> None:
    engine.loaded_checkpoint_dp_world_size = content["dp_world_size"]
    if wanted.module_only:
        return
    if wanted.schedule and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(content["lr_scheduler"])
    engine.global_steps = content["global_steps"]
    engine.global_samples = content.get("global_samples", engine.global_steps * engine.train_batch_size())
    engine.skipped_steps = content["skipped_steps"]
    engine.loaded_checkpoint_mp_world_size = content["mp_world_size"]
    zeros = list_files(opened.source.folder).zeros
    if wanted.with_optimizer and zeros:
        scaler = OptimizerFile.open(FileCache(), zeros[min(zeros)]).content.get("loss_scaler")
        saved = {key: getattr(scaler, key) for key in LOSS_SCALER_FIELDS if hasattr(scaler, key)}
        set_loss_scaler_state(state.loss_scaler, saved)


def _client_state(content: Mapping[str, Any], wanted: LoadArguments) -> dict[str, Any]:
    taken = {*_DEEPSPEEDS} if not wanted.module_only else {"module"}
    taken |= {"lr_scheduler"} if wanted.schedule else set()
    taken |= {"optimizer"} if wanted.optimizer_states else set()
    state, left_out = without_strangers({key: value for key, value in content.items() if key not in taken})
    if left_out:
        log.warning(
            "warning: what the program saved beside the engine's state comes without %s: no class is made because a "
            "file names it. torch.serialization.add_safe_globals([...]) before the load allows those that you trust",
            listed(left_out, 10),
        )
    return state
