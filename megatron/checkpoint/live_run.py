"""The live run as checkpointing sees it: what is saved, and what a Source is placed into.

live = LiveRun.of(engine, context, layouts, streams, schedule, **what_must_agree)     # collective
saving.save(live, Path("runs/a"), progress)
progress = loading.load(live, plan)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.config.batch_sizes import BatchSizes
from megatron.engine.engine_state import EngineState
from megatron.engine.optimizers import Muon
from megatron.engine.protocols import Engine
from megatron.engine.schedule import LearningRateSchedule
from megatron.parallel.agreement import gathered
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams
from megatron.ucp.deepspeed_compat import universal_checkpoint_info
from megatron.ucp.layout import Layout


@dataclass(frozen=True)
class Atlas:
    """The whole model's parameters, the same on every rank: how each is cut, which stages hold it, what is frozen."""

    layouts: Mapping[str, Layout]
    pp_stages: Mapping[str, tuple[int, ...]]
    frozen: frozenset[str] = frozenset()
    """Names of parameters that are not trained."""

    @classmethod
    def gather(cls, layouts: Mapping[str, Layout], frozen: Iterable[str], context: ParallelContext) -> Atlas:
        """From what this stage has. Collective over the world."""
        merged: dict[str, Layout] = {}
        stages: dict[str, set[int]] = {}
        all_frozen: set[str] = set()
        for stage, of_stage, frozen_there in gathered((context.pp_rank, dict(layouts), list(frozen))):
            all_frozen |= set(frozen_there)
            for name, layout in of_stage.items():
                if merged.setdefault(name, layout) != layout:
                    raise CheckpointError(f"stages declare different layouts of {name}: {merged[name]} and {layout}")
                stages.setdefault(name, set()).add(stage)
        names = sorted(merged)
        pp_stages = {n: tuple(sorted(stages[n])) for n in names}
        return cls({n: merged[n] for n in names}, pp_stages, frozenset(all_frozen))


@dataclass(frozen=True)
class LiveRun:
    engine: Engine
    """DeepSpeed's, freshly built or trained."""
    context: ParallelContext
    streams: RandomStreams
    schedule: LearningRateSchedule
    atlas: Atlas
    state: EngineState
    model: Mapping[str, Any]
    """What a Source must agree on: ModelConfig as plain values."""
    model_settings: Mapping[str, Any]
    """What another run of the model may do otherwise, and would not know: dropout, the length of samples, ..."""
    train_order: Mapping[str, Any]
    """Which samples come in which order (`Batches.train_order`); a Source's other one is told."""
    batch_sizes: BatchSizes
    excludes_frozen: bool = False
    """Saves leave out the weights that are not trained."""

    @classmethod
    def of(
        cls,
        engine: Engine,
        context: ParallelContext,
        layouts: Mapping[str, Layout],
        streams: RandomStreams,
        schedule: LearningRateSchedule,
        *,
        model: Mapping[str, Any],
        model_settings: Mapping[str, Any],
        train_order: Mapping[str, Any],
        batch_sizes: BatchSizes,
        padded_vocab_size: int,
        excludes_frozen: bool,
    ) -> LiveRun:
        """`layouts` is this stage's. Collective over the world."""
        frozen = [name for param, name in engine.param_names.items() if not param.requires_grad]
        atlas = Atlas.gather(layouts, frozen, context)
        # Where DeepSpeed's own converter looks for it (engine._save_checkpoint). It converts what the optimizer has.
        engine.module.universal_checkpoint_info = universal_checkpoint_info(
            {name: layout for name, layout in atlas.layouts.items() if name not in atlas.frozen},
            tp_size=context.tp_size,
            ep_size=context.ep_size,
            padded_vocab_size=padded_vocab_size,
            tied=[name for name, stages in atlas.pp_stages.items() if len(stages) > 1 and name not in atlas.frozen],
        )
        state = EngineState(engine, atlas.layouts, context, atlas.pp_stages, atlas.frozen)
        if isinstance(state.base, Muon):
            state.base.attach(state)
        agreed = dict(model), dict(model_settings), dict(train_order)
        return cls(engine, context, streams, schedule, atlas, state, *agreed, batch_sizes, excludes_frozen)
