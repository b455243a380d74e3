"""The whole configuration of a run, and the one place where it is judged.

`validate` checks everything that does not need a process group or a tensor, before anything is
written, raises once with every problem, and returns the configuration with what was left to derive filled in.

    config = parse(argv).config
    config = config.validate(world_size=8)       # ConfigError, or run.global_batch_size is a number
    config.length, config.parallel.topology(8)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron.config import batch_checks, model_checks, run_checks
from megatron.config.batch_sizes import BatchSizes
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.errors import ConfigError
from megatron.config.estimate import EstimateConfig
from megatron.config.length import RunLength
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig


@dataclass(frozen=True)
class Config:
    model: ModelConfig
    run: RunConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    estimate: EstimateConfig = EstimateConfig()

    def validate(self, world_size: int) -> Config:
        """This configuration for `world_size` ranks, with global batch size and token counts resolved. Local;
        reads which files exist. Raises one ConfigError that holds every problem found."""
        problems = [
            *model_checks.model_problems(self.model),
            *model_checks.parallel_problems(self.model, self.parallel, world_size),
            *batch_checks.batch_problems(self.run, self.parallel, world_size),
            *batch_checks.rampup_problems(self.run, self.parallel, world_size, None if self.checkpoint.load else 0),
            *run_checks.optimizer_problems(self.optimizer, self.run),
            *run_checks.optimizer_topology_problems(self.optimizer, self.parallel, self.model),
            *run_checks.run_problems(self.run),
            *run_checks.checkpoint_problems(self.checkpoint, self.run),
            *model_checks.left_out_problems(self.checkpoint, self.model, self.optimizer),
            *run_checks.data_problems(self.data, self.model),
        ]
        if problems:
            raise ConfigError(problems)
        return self._resolved(world_size)

    @property
    def zero_stage_as_run(self) -> int:
        """--zero-stage, but low precision without ZeRO is run as ZeRO-1 (engine/ds_config.py says why)."""
        stage = self.parallel.zero_stage
        return stage if self.optimizer.precision == "fp32" else max(stage, 1)

    @property
    def length(self) -> RunLength:
        """Needs a resolved configuration."""
        run = self.run
        return RunLength(self.batch_sizes, self.model.seq_length, run.train_iters, run.train_samples, run.train_tokens)

    @property
    def batch_sizes(self) -> BatchSizes:
        """Of every step. Needs a resolved configuration."""
        return BatchSizes(self._global_batch_size, self.run.rampup_batch_size)

    def require_batch_sizes(self, world_size: int, consumed_samples: int) -> None:
        """What is still to come of a ramp-up must fit `world_size` ranks. Raises ConfigError."""
        if problems := [*batch_checks.rampup_problems(self.run, self.parallel, world_size, consumed_samples)]:
            raise ConfigError(problems)

    @property
    def train_iters(self) -> int:
        """Iterations of a run that starts afresh. Needs a resolved configuration where the length was given in samples
        or tokens."""
        return self.length.last_iteration()

    @property
    def _global_batch_size(self) -> int:
        if self.run.global_batch_size is None:
            raise ValueError("global_batch_size is not resolved. What to do: config = config.validate(world_size)")
        return self.run.global_batch_size

    def _resolved(self, world_size: int) -> Config:
        dp_size = world_size // self.parallel.model_parallel_size
        run, optimizer = self.run, self.optimizer
        if run.global_batch_size is None:
            run = dataclasses.replace(run, global_batch_size=run.micro_batch_size * dp_size)
        seq_length = self.model.seq_length
        if optimizer.lr_warmup_tokens is not None:
            optimizer = dataclasses.replace(
                optimizer, lr_warmup_samples=round(optimizer.lr_warmup_tokens / seq_length), lr_warmup_tokens=None
            )
        if optimizer.lr_decay_tokens is not None:
            optimizer = dataclasses.replace(
                optimizer, lr_decay_samples=round(optimizer.lr_decay_tokens / seq_length), lr_decay_tokens=None
            )
        elif run.train_samples is not None and optimizer.lr_decay_samples is None:
            optimizer = dataclasses.replace(optimizer, lr_decay_samples=run.train_samples)
        return dataclasses.replace(self, run=run, optimizer=optimizer)
