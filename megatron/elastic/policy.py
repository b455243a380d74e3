"""Which topology a job takes on so many ranks. Pure.

The degrees that were asked for are kept where the ranks divide: first tp, then pp, sp and ep; data parallelism takes
what is left. What cannot be kept becomes the next smaller degree that divides, never a larger one. The global
batch is kept exactly, by accumulation: the micro batch is the largest, up to the one asked for, that divides it. Where
no topology of all ranks is legal, as of three ranks where the batch is eight, fewer ranks train and the others stand
by. A table says otherwise for the worlds that it names.

    fitted = fit(config, world_size=3, table=read_table("topologies.json"))
    fitted.config.parallel.topology(fitted.num_ranks), fitted.config.run.micro_batch_size
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.config import Config
from megatron.config.errors import ConfigError, Problem

DEGREES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "sp": "ds_sequence_parallel_size",
    "ep": "moe_expert_parallel_size",
}
KEYS = (*DEGREES, "zero", "micro_batch", "ranks")
_MAX_BYTES = 1 << 20
_MAX_RANKS = 1 << 20

Table = Mapping[int, Mapping[str, int]]
"""World size -> what is taken there, by KEYS."""


@dataclass(frozen=True)
class Fitted:
    config: Config
    """Valid for so many ranks."""
    num_ranks: int
    """That train; the others of the world stand by."""

    def told(self, world_size: int) -> str:
        batch, micro = self.config.run.global_batch_size, self.config.run.micro_batch_size
        topology = self.config.parallel.topology(self.num_ranks)
        steps = (batch or 0) // (micro * topology.dp_size)
        spare = f", {world_size - self.num_ranks} of {world_size} standing by" if world_size > self.num_ranks else ""
        return (
            f"{self.num_ranks} rank(s) as {topology}{spare}; batch {batch} = "
            f"{topology.dp_size} x micro batch {micro} x {steps} accumulated"
        )


def fit(config: Config, world_size: int, table: Table | None = None) -> Fitted:
    """Raises ConfigError: for a table's row that is not legal, and where nothing is on any number of ranks."""
    row = (table or {}).get(world_size)
    if row is not None:
        num_ranks = row.get("ranks", world_size)
        return Fitted(_of_row(config, row).validate(num_ranks), num_ranks)
    reasons: ConfigError | None = None
    for num_ranks in range(world_size, 0, -1):
        for candidate in _candidates(config, num_ranks):
            try:
                return Fitted(candidate.validate(num_ranks), num_ranks)
            except ConfigError as error:
                reasons = reasons or error
    raise reasons or ConfigError(_nothing_divides(config, world_size))


def read_table(path: str | Path) -> Table:
    """{"3": {"tp": 1, "micro_batch": 4}, ...}: world sizes, and of KEYS what is not as asked for on the command line.
    `ranks`: how many of them train. Raises ConfigError."""
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, more than {_MAX_BYTES}")
        content: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(Problem(f"the table of topologies cannot be read: {path}", found=str(error)[:200])) from None
    problems = [] if isinstance(content, dict) else [Problem("the table of topologies is no object", found=str(path))]
    for world, row in content.items() if isinstance(content, dict) else ():
        if fault := _row_fault(world, row):
            problems.append(
                Problem(
                    f"a row of the table of topologies is none: {world[:40]!r} in {path}",
                    found=fault,
                    expected=f"a world size with an object of whole numbers from 1 (zero: 0 to 3): {', '.join(KEYS)}",
                )
            )
    if problems:
        raise ConfigError(problems)
    return {int(world): row for world, row in content.items()}


def _row_fault(world: str, row: object) -> str | None:
    if not (world.isascii() and world.isdecimal() and 1 <= len(world) <= 7 and 1 <= int(world) <= _MAX_RANKS):
        return "no world size"
    if not isinstance(row, dict):
        return f"{type(row).__name__} where an object is expected"
    if unknown := sorted(set(row) - set(KEYS)):
        return f"unknown: {', '.join(unknown)}"[:200]
    for key, value in row.items():
        low, high = (0, 3) if key == "zero" else (1, int(world) if key == "ranks" else _MAX_RANKS)
        if type(value) is not int or not low <= value <= high:
            return f"{key} is {value!r}"[:200]
    return None


def _of_row(config: Config, row: Mapping[str, int]) -> Config:
    degrees = {key: row.get(key, getattr(config.parallel, name)) for key, name in DEGREES.items()}
    config = _with_degrees(config, **degrees)
    if "zero" in row:
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, zero_stage=row["zero"]))
    return _with_micro_batch(config, row.get("micro_batch", config.run.micro_batch_size))


def _candidates(config: Config, num_ranks: int) -> Iterator[Config]:
    """Best first."""
    parallel = config.parallel
    for tp in _sizes(parallel.tensor_model_parallel_size, num_ranks):
        for pp in _sizes(parallel.pipeline_model_parallel_size, num_ranks // tp):
            for sp in _sizes(parallel.ds_sequence_parallel_size, num_ranks // (tp * pp)):
                dp = num_ranks // (tp * pp * sp)
                micro = _micro_batch(config, dp)
                if micro is None:
                    continue
                for ep in _sizes(parallel.moe_expert_parallel_size, dp * sp):
                    yield _with_micro_batch(_with_degrees(config, tp, pp, sp, ep), micro)


def _sizes(asked: int, num_ranks: int) -> list[int]:
    """Of the divisors of the ranks the one asked for, then smaller ones."""
    return [size for size in range(min(asked, num_ranks), 0, -1) if num_ranks % size == 0]


def _micro_batch(config: Config, dp_size: int) -> int | None:
    """None where the batch does not go into so many parts. The sizes of a ramp-up have to go as well."""
    run = config.run
    batches = [run.global_batch_size or 0, *(run.rampup_batch_size or ())[:2]]
    if any(batch % dp_size for batch in batches):
        return None
    shares = [batch // dp_size for batch in batches]
    return next(m for m in range(run.micro_batch_size, 0, -1) if not any(share % m for share in shares))


def _with_degrees(config: Config, tp: int, pp: int, sp: int, ep: int) -> Config:
    parallel = dataclasses.replace(
        config.parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        ds_sequence_parallel_size=sp,
        moe_expert_parallel_size=ep,
        sequence_parallel=config.parallel.sequence_parallel and tp > 1,
    )
    return dataclasses.replace(config, parallel=parallel)


def _with_micro_batch(config: Config, micro_batch: int) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, micro_batch_size=micro_batch))


def _nothing_divides(config: Config, world_size: int) -> Problem:
    return Problem(
        "no topology of these ranks, or of fewer, holds the batch",
        found=f"{world_size} ranks, --global-batch-size {config.run.global_batch_size}",
        flags=("--global-batch-size",),
        fix="give a table of topologies (--topologies), or a batch that more numbers divide",
    )
