"""How the run is spread over ranks.

Degrees only; which rank has which coordinates is the Topology's business (ucp/topology.py).

    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, zero_stage=1)
    parallel.topology(world_size=8)          # tp2 pp2 dp2
    parallel.is_pipelined                    # True: the model is built as a DeepSpeed PipelineModule
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.config.errors import ConfigError, Problem
from megatron.config.flag import flag

if TYPE_CHECKING:
    from megatron.ucp.topology import Topology


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism. The data parallel size is what is left of the world size."""

    tensor_model_parallel_size: int = flag(
        1,
        "--tensor-model-parallel-size",
        "--model-parallel-size",
        help="ranks that share one block's matrices",
        unit="ranks",
    )
    pipeline_model_parallel_size: int = flag(1, help="pipeline stages", unit="stages")
    ds_sequence_parallel_size: int = flag(1, help="ranks that share one sequence (Ulysses)", unit="ranks")
    sequence_parallel: bool = flag(False, help="Megatron's sequence parallelism inside the tensor parallel group")
    no_pipeline_parallel: bool = flag(
        False, help="at one stage, build the plain model and not a one-stage PipelineModule"
    )
    pp_partition_method: str = flag(
        "type:transformer",
        help="how DeepSpeed deals the model to stages: type:REGEX (equal numbers of what matches, such as blocks), "
        "uniform (entries), or parameters",
    )
    moe_expert_parallel_size: int = flag(1, help="ranks that share the experts", unit="ranks")
    zero_stage: int = flag(0, help="DeepSpeed ZeRO stage", choices=(0, 1, 2, 3))

    @property
    def is_pipelined(self) -> bool:
        """Whether the model is built as a DeepSpeed PipelineModule. As upstream also at one stage, unless
        --no-pipeline-parallel or a ZeRO stage that DeepSpeed's pipeline engine refuses (2 and 3)."""
        if self.pipeline_model_parallel_size > 1:
            return True
        return not self.no_pipeline_parallel and self.zero_stage < 2

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and one sequence: tp x pp x sp."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.ds_sequence_parallel_size

    def topology(self, world_size: int) -> Topology:
        """The Topology of this many ranks. ConfigError, with legal neighbours, if they do not divide."""
        from megatron.ucp.topology import Topology

        problem = self.world_size_problem(world_size)
        if problem is not None:
            raise ConfigError(problem)
        return Topology(
            dp_size=world_size // self.model_parallel_size,
            tp_size=self.tensor_model_parallel_size,
            pp_size=self.pipeline_model_parallel_size,
            sp_size=self.ds_sequence_parallel_size,
            ep_size=self.moe_expert_parallel_size,
        )

    def world_size_problem(self, world_size: int) -> Problem | None:
        """Why this many ranks cannot be cut into the degrees asked for, or None."""
        size = self.model_parallel_size
        if world_size >= size and world_size % size == 0:
            return None
        below = world_size // size * size
        neighbours = [str(n) for n in (below, below + size) if n > 0]
        return Problem(
            "the number of ranks is not a multiple of tp x pp x sp",
            found=f"world size {world_size}",
            expected=f"a multiple of {size} = {self.tensor_model_parallel_size} x "
            f"{self.pipeline_model_parallel_size} x {self.ds_sequence_parallel_size}",
            flags=("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--ds-sequence-parallel-size"),
            fix=f"start {' or '.join(neighbours)} ranks (--num_gpus / --nproc-per-node), or change a degree",
        )
