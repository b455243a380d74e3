"""The live run as checkpointing sees it: what is saved, and what a Source is placed into.

live = LiveRun.of(engine, context, layouts, streams, schedule, model=..., train_order=...)     # collective
saving.save(live, Path("runs/a"), progress)
progress = loading.load(live, plan)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams
from megatron.training.agreement import CheckpointError, gathered
from megatron.training.engine_state import EngineState
from megatron.training.schedule import LearningRateSchedule
from megatron.ucp.deepspeed_compat import universal_checkpoint_info
from megatron.ucp.layout import Layout


@dataclass(frozen=True)
class Atlas:
    """The whole model's parameters, the same on every rank: how each is cut and which stages hold it."""

    layouts: Mapping[str, Layout]
    pp_stages: Mapping[str, tuple[int, ...]]

    @classmethod
    def gather(cls, layouts: Mapping[str, Layout], context: ParallelContext) -> Atlas:
        """From this stage's layouts. Collective over the world."""
        merged: dict[str, Layout] = {}
        stages: dict[str, set[int]] = {}
        for stage, of_stage in gathered((context.pp_rank, dict(layouts))):
            for name, layout in of_stage.items():
                if merged.setdefault(name, layout) != layout:
                    raise CheckpointError(f"stages declare different layouts of {name}: {merged[name]} and {layout}")
                stages.setdefault(name, set()).add(stage)
        names = sorted(merged)
        return cls({n: merged[n] for n in names}, {n: tuple(sorted(stages[n])) for n in names})


@dataclass(frozen=True)
class LiveRun:
    engine: Any
    """DeepSpeed's, freshly built or trained."""
    context: ParallelContext
    streams: RandomStreams
    schedule: LearningRateSchedule
    atlas: Atlas
    state: EngineState
    model: Mapping[str, Any]
    """What a Source must agree on: ModelConfig as plain values."""
    train_order: Mapping[str, Any]
    """Which samples come in which order (`Batches.train_order`); a Source's other one is told."""

    @property
    def global_batch_size(self) -> int:
        """In samples. DeepSpeed counts a sample once for every rank that has a chunk of it."""
        return self.engine.train_batch_size() // self.context.sp_size

    @classmethod
    def of(
        cls,
        engine: Any,
        context: ParallelContext,
        layouts: Mapping[str, Layout],
        streams: RandomStreams,
        schedule: LearningRateSchedule,
        *,
        model: Mapping[str, Any],
        train_order: Mapping[str, Any],
        padded_vocab_size: int,
    ) -> LiveRun:
        """`layouts` is this stage's. Collective over the world."""
        atlas = Atlas.gather(layouts, context)
        # Where DeepSpeed's own converter looks for it (engine._save_checkpoint).
        engine.module.universal_checkpoint_info = universal_checkpoint_info(
            atlas.layouts,
            tp_size=context.tp_size,
            padded_vocab_size=padded_vocab_size,
            tied=[name for name, stages in atlas.pp_stages.items() if len(stages) > 1],
        )
        state = EngineState(engine, atlas.layouts, context, atlas.pp_stages)
        return cls(engine, context, streams, schedule, atlas, state, dict(model), dict(train_order))
