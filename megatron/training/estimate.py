"""--estimate: what a run would need and where it would fit, from its flags alone.

    print(estimate(config, launched_ranks=1))       # neither torch nor DeepSpeed is loaded, no file is read

With --gpu-memory every topology of --gpus ranks is judged; those that fit are listed, best first, by this model of a
step's seconds (Narayanan et al. 2021, section 3, in its terms):

    compute    FLOPs of the model / (ranks x peak x EFFICIENCY), a third more where activations are recomputed
    bubble     compute x (pp - 1) / micro batches
    tensor     4 all-reduces of a micro batch's activations a block (6 with recomputation), over the fast link in a node
    data       2 x (d - 1) / d of a rank's gradients over the network, 3 x under ZeRO-3; over the fast link in one node
    pipeline   2 x a micro batch's activations at each end of a stage, over the network

Nothing overlaps in it, so that it is a ranking, not a promise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config import batch_checks, model_checks
from megatron.config.config import Config
from megatron.config.errors import ConfigError, Problem
from megatron.model.flops import flops_per_token, num_parameters
from megatron.model.memory import RankMemory, rank_memory, worst_stage
from megatron.ucp.topology import Topology

EFFICIENCY = 0.5
"""Of the peak that matrix products reach."""
USABLE = 0.95
"""Of --gpu-memory; the rest is the CUDA context's and the allocator's."""
DEFAULT_PEAK_TFLOPS = 312.0
"""An A100's in bf16 (NVIDIA's data sheet)."""
MOST_LISTED = 20
GB = 10**9


@dataclass(frozen=True)
class Fit:
    """A topology, what its fullest rank needs, and what a step would take."""

    topology: Topology
    zero_stage: int
    memory: RankMemory
    seconds: float
    tokens_per_second: float


def estimate(config: Config, launched_ranks: int) -> str:
    """The answer, lines of text. `config` is parsed, not validated: data and length are not needed. Raises ConfigError
    for what the model, the batch sizes or the topology cannot be."""
    asked = config.estimate
    if config.model.vocab_size is None:
        raise ConfigError(
            Problem(
                "--estimate does not know the size of the vocabulary",
                found="no --vocab-size; a tokenizer is not loaded for it",
                flags=("--vocab-size",),
                fix="give it, such as --vocab-size 50257",
            )
        )
    if problems := [*model_checks.model_problems(config.model), *_problems_of_the_question(config)]:
        raise ConfigError(problems)
    if asked.gpu_memory is not None:
        return _listed(config)
    ranks = asked.gpus or max(launched_ranks, config.parallel.model_parallel_size)
    return _of_one(_for_ranks(config, ranks), ranks)


def _problems_of_the_question(config: Config) -> Iterator[Problem]:
    asked = config.estimate
    if config.model.lora_rank:
        yield Problem(
            "--estimate does not know how little adapters need",
            flags=("--estimate", "--lora-rank"),
            fix="leave --lora-rank out: that is a bound from above",
        )
    if asked.gpu_memory is not None and asked.gpus is None:
        yield Problem("--gpu-memory is of how many GPUs?", flags=("--gpus",), fix="give --gpus")
    for name in ("gpus", "gpu_memory", "gpus_per_node", "node_bandwidth", "network_bandwidth", "peak_tflops"):
        value = getattr(asked, name)
        if value is not None and value <= 0:
            flag = "--" + name.replace("_", "-")
            yield Problem(f"{flag} is not positive", found=f"{value:g}", expected="more than 0", flags=(flag,))


def _for_ranks(config: Config, ranks: int) -> Config:
    """With the global batch size filled in. Raises ConfigError."""
    problems = [
        *model_checks.parallel_problems(config.model, config.parallel, ranks),
        *batch_checks.batch_problems(config.run, config.parallel, ranks),
    ]
    if problems:
        raise ConfigError(problems)
    if config.run.global_batch_size is not None:
        return config
    size = config.run.micro_batch_size * (ranks // config.parallel.model_parallel_size)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, global_batch_size=size))


def _of_one(config: Config, ranks: int) -> str:
    topology, zero_stage = config.parallel.topology(ranks), config.zero_stage_as_run
    is_cuda = config.estimate.gpus is not None
    lines = [
        f"{num_parameters(config.model):,} parameters, {topology}, ZeRO-{zero_stage}, {config.optimizer.precision}, "
        f"{ranks} rank(s) on {'GPUs' if is_cuda else 'CPUs'}, micro batch {config.run.micro_batch_size}, "
        f"sequence {config.model.seq_length}",
        "GiB of one rank     parameters  weights  gradients  optimizer  activations  buffers     peak",
    ]
    for stage in range(topology.pp_size):
        memory = rank_memory(config, topology, zero_stage, stage, is_cuda)
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.buffers, memory.peak)
        cells = [f"{size / 2**30:{width}.2f}" for size, width in zip(sizes, (9, 11, 11, 13, 9, 9), strict=True)]
        lines.append(f"stage {stage:<13}{memory.parameters:>11,}{''.join(cells)}")
    lines.append(
        "peak: at the beginning of backward or at the optimizer's step, whichever needs more; so less than the sum."
    )
    lines.append("Not counted: the libraries themselves, some 0.4 GiB of a process; on a GPU its context.")
    if config.run.deepspeed_config is not None:
        lines.append(f"Not looked at: what {config.run.deepspeed_config} offloads or buffers.")
    return "\n".join(lines)


def _listed(config: Config) -> str:
    asked = config.estimate
    fits: list[Fit] = []
    judged, smallest = 0, None
    limit = USABLE * (asked.gpu_memory or 0) * GB
    for candidate in _candidates(config):
        judged += 1
        fit = _judged(candidate, asked.gpus or 1)
        if smallest is None or fit.memory.peak < smallest.memory.peak:
            smallest = fit
        if fit.memory.peak <= limit:
            fits.append(fit)
    head = (
        f"{num_parameters(config.model):,} parameters, {config.optimizer.precision}, sequence "
        f"{config.model.seq_length}, micro batch {config.run.micro_batch_size}, on {asked.gpus} GPUs of "
        f"{asked.gpu_memory:g} GB ({USABLE:.0%} of it usable): {len(fits)} of {judged} topologies fit"
    )
    if not fits:
        if smallest is None:
            return f"{head}. No topology divides the model and the batch: other --gpus or --global-batch-size."
        need = smallest.memory.peak / GB
        return (
            f"{head}. The smallest is {smallest.topology}, ZeRO-{smallest.zero_stage}: {need:.1f} GB. What to do: more "
            "GPUs, a smaller --micro-batch-size, or --recompute-granularity full"
        )
    lines = [head, "topology                 ZeRO  peak GB  step s  tokens/s    MFU"]
    peak = _peak_flops(config) * (asked.gpus or 1)
    for fit in sorted(fits, key=lambda fit: -fit.tokens_per_second)[:MOST_LISTED]:
        mfu = fit.tokens_per_second * flops_per_token(config.model) / peak
        lines.append(
            f"{fit.topology!s:25}{fit.zero_stage:4}{fit.memory.peak / GB:9.1f}{fit.seconds:8.2f}"
            f"{fit.tokens_per_second:10,.0f}{mfu:7.1%}"
        )
    if len(fits) > MOST_LISTED:
        lines.append(f"and {len(fits) - MOST_LISTED} more")
    lines.append(
        f"step s: {_peak_flops(config) / 1e12:g} TFLOP/s x {EFFICIENCY:g}, {asked.gpus_per_node} GPUs a node at "
        f"{asked.node_bandwidth:g} GB/s, {asked.network_bandwidth:g} GB/s between nodes, nothing overlapping: a "
        "ranking, not a promise"
    )
    return "\n".join(lines)


def _candidates(config: Config) -> Iterator[Config]:
    """The same run under every topology and ZeRO stage of --gpus ranks that it can have."""
    ranks, model = config.estimate.gpus or 1, config.model
    experts = max(model.num_experts) if model.has_experts else 1
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    for tp in (size for size in sizes if size <= config.estimate.gpus_per_node):
        for pp in (size for size in sizes if size <= model.num_layers and ranks % (tp * size) == 0):
            for ep in (size for size in sizes if experts % size == 0):
                for zero_stage in (0, 1) if pp > 1 else (0, 1, 2, 3):
                    parallel = dataclasses.replace(
                        config.parallel,
                        tensor_model_parallel_size=tp,
                        pipeline_model_parallel_size=pp,
                        moe_expert_parallel_size=ep,
                        zero_stage=zero_stage,
                        sequence_parallel=config.parallel.sequence_parallel and tp > 1,
                        no_pipeline_parallel=pp == 1,
                    )
                    candidate = dataclasses.replace(config, parallel=parallel)
                    if candidate.zero_stage_as_run != zero_stage:
                        continue  # the one with the stage that is run is listed
                    try:
                        yield _for_ranks(candidate, ranks)
                    except ConfigError:
                        continue


def _judged(config: Config, ranks: int) -> Fit:
    topology, zero_stage = config.parallel.topology(ranks), config.parallel.zero_stage
    _, memory = worst_stage(config, topology, zero_stage, is_cuda=True)
    seconds = _step_seconds(config, topology, zero_stage, memory)
    tokens = (config.run.global_batch_size or 0) * config.model.seq_length
    return Fit(topology, zero_stage, memory, seconds, tokens / seconds)


def _step_seconds(config: Config, topology: Topology, zero_stage: int, memory: RankMemory) -> float:
    model, run, asked = config.model, config.run, config.estimate
    ranks = topology.world_size
    size = 4 if config.optimizer.precision == "fp32" else 2
    batch = run.global_batch_size or 0
    num_micro_batches = batch // (run.micro_batch_size * topology.dp_size)
    is_recomputed = model.recompute_granularity == "full"
    flops = flops_per_token(model) * batch * model.seq_length * (4 / 3 if is_recomputed else 1)
    compute = flops / (ranks * _peak_flops(config) * EFFICIENCY)
    bubble = compute * (topology.pp_size - 1) / num_micro_batches
    fast, slow = asked.node_bandwidth * GB, asked.network_bandwidth * GB
    activation = size * run.micro_batch_size * model.seq_length * model.hidden_size / topology.sp_size
    tp, dp = topology.tp_size, topology.dp_size * topology.sp_size
    blocks = model.num_layers / topology.pp_size * num_micro_batches
    tensor = (6 if is_recomputed else 4) * blocks * 2 * (tp - 1) / tp * activation / fast
    link = fast if ranks <= asked.gpus_per_node else slow
    data = (3 if zero_stage == 3 else 2) * (dp - 1) / dp * size * memory.parameters / link
    pipeline = 0.0 if topology.pp_size == 1 else 2 * num_micro_batches * activation / link
    return compute + bubble + tensor + data + pipeline


def _peak_flops(config: Config) -> float:
    return (config.estimate.peak_tflops or DEFAULT_PEAK_TFLOPS) * 1e12
