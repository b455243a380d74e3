"""A DeepSpeed engine that others built, as checkpointing sees it: names, shapes, what is trained, who holds what.

if reason := left_to_deepspeed(engine): ...         # pipelines, tensor parallelism, experts, NVMe, ...
state = engine_state(engine)                        # an EngineState; local
"""

from __future__ import annotations

from collections.abc import Collection

import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.distributed import ProcessGroup

from megatron.engine.engine import PipeEngine, PlainEngine
from megatron.engine.engine_state import EngineState, is_locatable, whole_shape
from megatron.engine.optimizer_states import UnsupportedOptimizerError
from megatron.engine.protocols import ForeignEngine
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Layout
from megatron.ucp.topology import Topology


def left_to_deepspeed(engine: ForeignEngine) -> str | None:
    """Why this engine's checkpoints are DeepSpeed's own business; None where they are ours, and then the optimizer's
    states are made. Local, the same answer on every rank."""
    reasons = {
        "it is the trainer's here, which saves and loads it itself": isinstance(engine, (PlainEngine, PipeEngine)),
        "it has pipeline stages": isinstance(engine, PipelineEngine),
        "it has tensor parallelism": engine.mp_world_size > 1,
        "it has experts": engine.has_moe_layers,
        "it has no optimizer": engine.optimizer is None or not hasattr(engine.optimizer, "param_groups"),
        f"{type(engine.optimizer).__name__} keeps its state in a form of its own": not is_locatable(engine.optimizer),
        "its optimizer's states are on NVMe": engine.zero_nvme_offload_optimizer(),
        "ZeRO partitions over fewer ranks than there are (MiCS, hpZ or an own group)": (
            dist.get_world_size(group=engine.seq_data_parallel_group) != dist.get_world_size()
        ),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        return reason
    try:
        engine_state(engine).make_states()
    except UnsupportedOptimizerError as error:
        return str(error)
    return None


def engine_state(engine: ForeignEngine, without: Collection[str] = ()) -> EngineState:
    """Parameters by the names they have in the module; frozen is what the optimizer does not have. `without`: frozen
    parameters that the checkpoint is not about. Local. Raises UnsupportedOptimizerError."""
    world_size = dist.get_world_size()
    group: ProcessGroup | None = engine.seq_data_parallel_group if world_size > 1 else None
    context = ParallelContext(Topology(dp_size=world_size), dist.get_rank(), zero_group=group)  # type: ignore[arg-type]
    shapes = {name: whole_shape(param) for param, name in engine.param_names.items() if name not in without}
    layouts = {name: Layout.unique(shape) for name, shape in shapes.items()}
    stages = dict.fromkeys(layouts, (0,))
    trained = {name for names in EngineState(engine, layouts, context, stages).members for name in names}
    return EngineState(engine, layouts, context, stages, frozenset(layouts) - trained)
