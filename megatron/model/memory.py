"""How much memory a rank of a run needs at its peak, from the configuration alone.

memory = rank_memory(config, topology, zero_stage, stage=0)      # ZeRO stage and pipeline stage
memory.weights, memory.optimizer, memory.activations, memory.peak          # bytes
print(worst_stage(config, topology, zero_stage).peak / 2**30)

What is counted is tensors; libraries themselves (some 0.4 GiB of a process, and a CUDA context) come on top.
Activations are what autograd keeps of a block, operation by operation, and are held against torch's own account of it
by tests; what DeepSpeed copies is measured (benchmarks/memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.config import Config
from megatron.config.model import ModelConfig
from megatron.ucp.topology import Topology

REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults: elements summed at once (reduce_bucket_size), and gathered by ZeRO-3 at a time
(stage3_max_live_parameters)."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    """Master weights and the optimizer's states."""
    activations: int
    """Kept for backward, of all micro batches in flight, and the logits."""
    buffers: int
    """Copies that exchange or flatten gradients and gather weights; scratch of the matrix library."""
    peak: int
    """At most the sum of the others: not all are there at once."""
    parameters: int
    """Elements of this rank's shards."""


def worst_stage(config: Config, topology: Topology, zero_stage: int, is_cuda: bool = False) -> tuple[int, RankMemory]:
    """(stage, its memory) of the pipeline stage that needs most."""
    stages = [(stage, rank_memory(config, topology, zero_stage, stage, is_cuda)) for stage in range(topology.pp_size)]
    return max(stages, key=lambda pair: pair[1].peak)


def rank_memory(
    config: Config, topology: Topology, zero_stage: int, stage: int = 0, is_cuda: bool = False
) -> RankMemory:
    """`config` is validated, with a vocabulary. `is_cuda`: attention and elementwise operations are fused there. Pure.

    Two moments compete for the peak: the beginning of backward, where all activations are there and the output layer's
    gradient comes; and the optimizer's step, where they are gone and gradients are flattened and exchanged.
    """
    model, size = config.model, 4 if config.optimizer.precision == "fp32" else 2
    dense, experts = stage_parameters(model, topology, stage)
    parameters = dense + experts
    zero_size = topology.dp_size * topology.sp_size
    is_alone = zero_size == 1
    # Of a state that ZeRO shares; experts over fewer ranks.
    shared = (dense + experts * topology.ep_size) / zero_size if zero_stage else parameters
    if size == 4 and (zero_stage == 0 or (zero_stage < 3 and is_alone)):
        masters = 0.0  # the weights are the masters
    else:
        masters = 4 * shared
    weights = size * (shared if zero_stage == 3 else parameters)
    optimizer = masters + 4 * _states(config) * shared
    accumulates = config.run.global_batch_size // (config.run.micro_batch_size * topology.dp_size) > 1
    in_fp32 = config.optimizer.precision == "bf16" and config.optimizer.accumulate_allreduce_grads_in_fp32
    gradients = size * (parameters if zero_stage < 2 else shared)
    # There from the start: ZeRO-3's part of the gradients, and the sums in fp32 of DeepSpeed's BF16_Optimizer.
    lasting = gradients if zero_stage == 3 else 4 * parameters if in_fp32 else 0

    kept, logits = _activations(config, topology, stage, is_cuda)
    head = 0
    if _has_head(topology, stage):
        head = size * _vocabulary(model, topology) * model.hidden_size // topology.tp_size
    scratch = 0 if is_cuda else _scratch(config, topology, stage)
    bucket = size * min(parameters, REDUCE_BUCKET)
    gathered = size * min(parameters, MAX_LIVE) if zero_stage == 3 else 0
    at_head = gathered + (bucket if zero_stage == 3 and not is_alone else 0)
    before = gradients if zero_stage != 3 and (accumulates or topology.pp_size > 1) else 0
    at_step = scratch + gradients
    if zero_stage == 0:
        at_step += 0 if is_alone else bucket
    elif zero_stage == 3:
        at_step = scratch + gathered + 2 * bucket
    elif is_alone:  # a flat gradient, in fp32 too
        at_step += 4 * shared + (2 * shared if size == 2 else 0)
    else:
        at_step += 2 * size * shared + (bucket if zero_stage == 2 else 0)
    if zero_stage == 3:
        gradients = 0  # already counted
    static = weights + optimizer + lasting
    return RankMemory(
        weights=round(weights),
        gradients=round(gradients + lasting),
        optimizer=round(optimizer),
        activations=round(kept + logits),
        buffers=round(max(at_head + scratch, at_step - gradients)),
        peak=round(static + max(before + kept + logits + head + scratch + at_head, at_step)),
        parameters=round(parameters),
    )


def stage_parameters(model: ModelConfig, topology: Topology, stage: int) -> tuple[float, float]:
    """Elements of one rank's shards of a stage: (all but experts, experts)."""
    h, tp, head_dim = model.hidden_size, topology.tp_size, model.head_dim
    norm = h if model.normalization == "rmsnorm" else 2 * h
    qkv = (model.num_attention_heads + 2 * model.num_key_value_heads) * head_dim
    out = model.num_attention_heads * head_dim
    attention = (h * (qkv + out) + (qkv if model.has_qkv_bias else 0)) / tp
    attention += (h if model.has_attention_output_bias else 0) + (2 * head_dim if model.qk_layernorm else 0)
    dense = experts = 0.0
    for layer in stage_layers(model, topology, stage):
        dense += 2 * norm + attention
        num_experts = model.num_experts_of(layer)
        if num_experts == 1:
            dense += _mlp(model, model.ffn_hidden_size or 0, tp)
        else:
            dense += num_experts * h + _mlp(model, model.moe_shared_expert_intermediate_size, tp)
            experts += num_experts / topology.ep_size * _mlp(model, model.moe_ffn_hidden_size or 0, tp, bias_ranks=tp)
    table = _vocabulary(model, topology) * h / tp
    is_first, is_last = stage == 0, stage == topology.pp_size - 1
    if is_first:
        dense += table + (norm if model.embed_layernorm else 0)
        dense += (model.max_position_embeddings or 0) * h if model.positions == "learned_absolute" else 0
    if is_last:
        dense += norm
        if model.untie_embeddings_and_output_weights or not is_first:
            dense += table  # a weight of its own, or the copy of a tied one
        dense += _vocabulary(model, topology) / tp if model.add_output_layer_bias else 0
    return dense, experts


def stage_layers(model: ModelConfig, topology: Topology, stage: int) -> range:
    """Blocks of a stage, dealt evenly; where they do not divide, the first stages get one more."""
    base, rest = divmod(model.num_layers, topology.pp_size)
    start = stage * base + min(stage, rest)
    return range(start, start + base + (stage < rest))


def block_activations(model: ModelConfig, topology: Topology, tokens: float, layer: int, is_cuda: bool) -> float:
    """Elements of the run's precision that autograd keeps of one block and one micro batch of `tokens` on this rank (of
    its part of the sequence under Ulysses)."""
    h, tp = model.hidden_size, topology.tp_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    is_rms_wide = model.normalization == "rmsnorm" and not is_cuda  # the normalised input, beside the input
    norms = (3 if model.use_parallel_residual else 4) * h + (2 * h if is_rms_wide else 0)
    attention = (q + 2 * kv) / tp + q / tp
    attention += (q + kv) / tp if model.positions == "rope" else 0
    attention += 2 * (q + kv) / tp if model.qk_layernorm else 0
    if model.recompute_granularity != "selective":
        # Matrices of all pairs of positions: ALiBi's weights; with dropout, which is fused only on CUDA, three more.
        matrices = (1 if model.positions == "alibi" else 0) + (
            3 if model.attention_dropout and (not is_cuda or model.positions == "alibi") else 0
        )
        attention += matrices * model.num_attention_heads / tp * model.seq_length
    kept_of_gate = 3 if is_cuda else 4
    num_experts = model.num_experts_of(layer)
    if num_experts == 1:
        mlp = (kept_of_gate if model.swiglu else 2) * (model.ffn_hidden_size or 0) / tp
    else:
        width = (kept_of_gate if model.swiglu else 2) * (model.moe_ffn_hidden_size or 0) / tp
        mlp = model.topk * (width + 4 * h)  # what is sent to an expert, and comes back weighted, beside it
        mlp += (kept_of_gate if model.swiglu else 2) * model.moe_shared_expert_intermediate_size / tp
    dropped = 2 * h if model.hidden_dropout else 0
    return tokens * (norms + attention + mlp + dropped)


def _activations(config: Config, topology: Topology, stage: int, is_cuda: bool) -> tuple[float, float]:
    """Bytes: (kept of all micro batches in flight, the logits of one)."""
    model, size = config.model, 4 if config.optimizer.precision == "fp32" else 2
    tokens = config.run.micro_batch_size * model.seq_length / topology.sp_size
    blocks = [
        size * block_activations(model, topology, tokens, layer, is_cuda)
        for layer in stage_layers(model, topology, stage)
    ]
    boundary = size * tokens * model.hidden_size
    if model.recompute_granularity == "full":
        recomputed = len(blocks)
        if model.recompute_method == "block":
            recomputed = min(model.recompute_num_layers, len(blocks))
        together = model.recompute_num_layers if model.recompute_method != "block" else 1
        one_group = sum(sorted(blocks)[-together:])
        kept = boundary * -(-recomputed // together) + sum(blocks[recomputed:]) if blocks else 0.0
    else:
        kept, one_group = sum(blocks), 0.0
    num_micro_batches = config.run.global_batch_size // (config.run.micro_batch_size * topology.dp_size)
    in_flight = min(topology.pp_size - stage, num_micro_batches)
    if topology.pp_size > 1:
        kept += 2 * boundary  # received, and sent on
    kept = in_flight * kept + one_group
    if not _has_head(topology, stage):
        return kept, 0.0
    kept += 2 * boundary  # the last norm's input and output
    return kept, size * tokens * _vocabulary(model, topology) / topology.tp_size


def _scratch(config: Config, topology: Topology, stage: int) -> float:
    """On a CPU the matrix library packs one factor of a product, and keeps the largest buffer that this took."""
    model = config.model
    tokens = config.run.micro_batch_size * model.seq_length / topology.sp_size
    width = (model.ffn_hidden_size or 0) * (2 if model.swiglu else 1)
    widest = max(width, _vocabulary(model, topology) if _has_head(topology, stage) else 0)
    return (4 if config.optimizer.precision == "fp32" else 2) * tokens * widest / topology.tp_size


def _states(config: Config) -> float:
    """fp32 numbers that the optimizer keeps of one parameter."""
    optimizer = config.optimizer
    return {"adam": 2.0, "sgd": 1.0 if optimizer.sgd_momentum else 0.0, "adafactor": 0.0, "muon": 1.2}.get(
        optimizer.optimizer, 1.0
    )


def _has_head(topology: Topology, stage: int) -> bool:
    return stage == topology.pp_size - 1


def _vocabulary(model: ModelConfig, topology: Topology) -> int:
    return model.padded_vocab_size(topology.tp_size)


def _mlp(model: ModelConfig, width: int, tp: int, bias_ranks: int = 1) -> float:
    """`bias_ranks`: over how many ranks the output's bias is cut; an expert's is (layers/experts.py)."""
    if not width:
        return 0.0
    up = (2 if model.swiglu else 1) * width
    biases = up / tp + model.hidden_size / bias_ranks if model.add_bias_linear else 0
    return model.hidden_size * (up + width) / tp + biases
