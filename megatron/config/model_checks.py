"""Checks of the model and of how it is cut: one generator per subject, which never stops early.

A problem lists the legal values nearest to what was asked, so the next command line is right.

    problems = [*model_problems(config.model), *parallel_problems(config.model, config.parallel, world_size=8)]
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron.config.checking import at_least, divisors, flag_of, nearest, within
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.errors import Problem
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.ucp.naming.adapters import default_projections, projection_faults


def legal_tensor_sizes(model: ModelConfig) -> list[int]:
    """Tensor parallel sizes into which this model can be cut: whole query heads on every rank, evenly or not, and where
    a rank has whole key/value heads, all the query heads that share them. Fewer key/value heads than ranks are kept in
    parts (layers/heads.py), of which each rank needs one."""
    kv_features = model.num_key_value_heads * model.head_dim
    return list(range(1, min(model.num_attention_heads, kv_features, *_mlp_widths(model)) + 1))


def _mlp_widths(model: ModelConfig) -> list[int]:
    widths = [model.ffn_hidden_size]
    if model.has_experts:
        widths.append(model.moe_ffn_hidden_size)
        if model.moe_shared_expert_intermediate_size:
            widths.append(model.moe_shared_expert_intermediate_size)
    return widths


def legal_sequence_sizes(model: ModelConfig, tp_size: int) -> list[int]:
    """Ulysses degrees: a tp rank's heads, as many on each, and the sequence are cut."""
    heads = math.gcd(model.num_attention_heads, model.num_key_value_heads)
    return divisors(math.gcd(heads // tp_size, model.seq_length)) if heads % tp_size == 0 else [1]


def left_out_problems(
    checkpoint: CheckpointConfig, model: ModelConfig, optimizer: OptimizerConfig
) -> Iterator[Problem]:
    """Of saves without the weights that are not trained."""
    if not checkpoint.exclude_frozen_parameters:
        return
    flag = "--exclude-frozen-parameters"
    if not model.lora_rank and not optimizer.freeze_parameters:
        yield Problem(
            "nothing is frozen that saves could leave out", found=f"{flag} without --lora-rank or --freeze-parameters",
            flags=(flag, "--lora-rank", "--freeze-parameters"), fix=f"drop {flag}",
        )  # fmt: skip
    elif checkpoint.pretrained_checkpoint is None:
        yield Problem(
            "saves that leave out the frozen weights, and no checkpoint that has them", found=flag,
            expected="--pretrained-checkpoint, from which every run that goes on takes them again",
            flags=(flag, "--pretrained-checkpoint"), fix=f"give --pretrained-checkpoint, or drop {flag}",
        )  # fmt: skip
    if checkpoint.export_hf_interval is not None and not model.lora_rank:
        yield Problem(
            "an export needs all weights, and saves leave some out", found=f"--export-hf-interval with {flag}",
            flags=("--export-hf-interval", flag), fix="drop one of the two",
        )  # fmt: skip


def _adapter_problems(model: ModelConfig) -> Iterator[Problem]:
    flags = ("--lora-rank", "--lora-alpha", "--lora-target-modules", "--lora-fused")
    yield from at_least(0, model, "lora_rank")
    if not model.lora_rank:
        if model.lora_alpha is not None or model.lora_target_modules or model.lora_fused:
            yield Problem("adapters without a rank", flags=flags, fix="give --lora-rank too, or none of these flags")
        return
    if model.lora_alpha <= 0:
        yield Problem("adapters that add nothing", found=f"--lora-alpha {model.lora_alpha:g}", flags=flags)
    faults = projection_faults(
        model.lora_target_modules or model.lora_projections,
        is_gated=model.swiglu,
        has_experts=model.has_experts,
        is_fused=model.lora_fused,
    )
    if faults:
        possible = " ".join(default_projections(model.swiglu, model.has_experts))
        yield Problem(
            "adapters of matrices that cannot have them", "; ".join(faults), f"some of {possible}", flags=flags
        )


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "ffn_hidden_size",
             "num_key_value_heads", "max_position_embeddings", "make_vocab_size_divisible_by",
             "recompute_num_layers")  # fmt: skip
    yield from at_least(1, model, *sizes)
    if model.vocab_size is not None:
        yield from at_least(1, model, "vocab_size")
    if min(getattr(model, size) for size in sizes) < 1:
        return  # What follows divides by these.
    if model.kv_channels < 1:
        yield Problem("a head has no features", found=f"--kv-channels {model.kv_channels}", flags=("--kv-channels",))
        return
    is_derived = model.kv_channels == model.hidden_size // model.num_attention_heads
    if is_derived and model.hidden_size % model.num_attention_heads:
        yield Problem(
            "heads do not divide the hidden size",
            found=f"--hidden-size {model.hidden_size} with --num-attention-heads {model.num_attention_heads}",
            expected="hidden size a multiple of the heads",
            flags=("--hidden-size", "--num-attention-heads"),
            fix="heads of " + nearest(divisors(model.hidden_size), model.num_attention_heads) + ", or --kv-channels",
        )
    if model.num_attention_heads % model.num_key_value_heads:
        yield Problem(
            "key/value heads do not divide the query heads",
            found=f"--num-key-value-heads {model.num_key_value_heads} with "
            f"--num-attention-heads {model.num_attention_heads}",
            expected="query heads a multiple of the key/value heads",
            flags=("--num-key-value-heads", "--num-attention-heads"),
            fix="key/value heads of " + nearest(divisors(model.num_attention_heads), model.num_key_value_heads),
        )
    yield from _adapter_problems(model)
    if model.swiglu and model.exact_gelu:
        yield Problem(
            "an exact GELU in an MLP that has none",
            found="--exact-gelu with --swiglu, whose activation is SiLU",
            flags=("--exact-gelu", "--swiglu"),
            fix="drop one of the two",
        )
    if model.seq_length > model.max_position_embeddings and model.positions == "learned_absolute":
        yield Problem(
            "the sequence is longer than the position table",
            found=f"--seq-length {model.seq_length} with --max-position-embeddings {model.max_position_embeddings}",
            expected="a sequence length of at most the positions",
            flags=("--seq-length", "--max-position-embeddings"),
            fix=f"--max-position-embeddings {model.seq_length}",
        )
    yield from within(0.0, 1.0, model, "hidden_dropout", "attention_dropout")
    yield from at_least(0, model, "layernorm_epsilon", "init_method_std")
    if model.recompute_method is not None and model.recompute_granularity != "full":
        yield Problem(
            "--recompute-method needs --recompute-granularity full",
            found=f"--recompute-granularity {model.recompute_granularity}",
            flags=("--recompute-method", "--recompute-granularity"),
            fix="add --recompute-granularity full, or drop --recompute-method",
        )
    yield from _position_problems(model)
    yield from _bias_problems(model)
    yield from expert_problems(model)


def _position_problems(model: ModelConfig) -> Iterator[Problem]:
    kind = model.position_embedding_type
    if model.use_rotary_position_embeddings and kind == "alibi":
        yield Problem(
            "rotary positions and ALiBi at once",
            found="--use-rotary-position-embeddings with --position-embedding-type alibi",
            flags=("--use-rotary-position-embeddings", "--position-embedding-type"),
            fix="drop one of the two",
        )
    yield from within(0.0, 1.0, model, "rotary_percent")
    if model.positions == "rope":
        yield from at_least(1, model, "rope_theta", "rope_original_max_position_embeddings")
    if model.positions == "rope" and model.rotary_dim < 2:
        yield Problem(
            "nothing of a head is rotated",
            found=f"--rotary-percent {model.rotary_percent:g} of {model.head_dim} features",
            expected="at least 2 features",
            flags=("--rotary-percent",),
            # Rounded up, or what is advised would not do either.
            fix=f"--rotary-percent of at least {math.ceil(2e4 / model.head_dim) / 1e4:g}",
        )
    if model.rope_scaling_type == "longrope":
        yield from _long_rope_problems(model)
    elif model.rope_scaling_type is not None and model.rope_scaling_factor < 1:
        yield Problem(
            "rotary positions cannot be shrunk",
            found=f"--rope-scaling-factor {model.rope_scaling_factor:g}",
            expected="1 or more",
            flags=("--rope-scaling-factor",),
        )
    if model.rope_scaling_type == "llama3" and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        yield Problem(
            "no wave is between the short ones, which are left, and the long ones, which are stretched",
            found=f"--rope-low-freq-factor {model.rope_low_freq_factor:g}, "
            f"--rope-high-freq-factor {model.rope_high_freq_factor:g}",
            expected="the low factor below the high one",
            flags=("--rope-low-freq-factor", "--rope-high-freq-factor"),
        )


def _long_rope_problems(model: ModelConfig) -> Iterator[Problem]:
    pairs = model.rotary_dim // 2
    for name in ("rope_short_factors", "rope_long_factors"):
        factors = getattr(model, name)
        if len(factors) != pairs or min(factors, default=1.0) <= 0:
            yield Problem(
                "longrope divides every frequency by a factor of its own",
                found=f"{flag_of(name)} of {len(factors)} numbers, the least {min(factors, default=0.0):g}",
                expected=f"{pairs} numbers above 0, one for two of the {model.rotary_dim} rotated features",
                flags=(flag_of(name), "--rope-scaling-type"),
                fix="give those of the model's config.json, or take them from a checkpoint with --use-checkpoint-args",
            )
    for name in ("rope_short_mscale", "rope_long_mscale"):
        if not getattr(model, name) > 0:
            yield Problem(
                f"{flag_of(name)} is out of range", found=f"{getattr(model, name):g}", expected="more than 0",
                flags=(flag_of(name),),
            )  # fmt: skip


def _bias_problems(model: ModelConfig) -> Iterator[Problem]:
    if model.add_output_layer_bias and not model.untie_embeddings_and_output_weights:
        yield Problem(
            "the word embedding has no bias to share with the output layer",
            found="--add-output-layer-bias without --untie-embeddings-and-output-weights",
            flags=("--add-output-layer-bias", "--untie-embeddings-and-output-weights"),
            fix="add --untie-embeddings-and-output-weights, or drop --add-output-layer-bias",
        )


def expert_problems(model: ModelConfig) -> Iterator[Problem]:
    yield from at_least(1, model, "expert_interval", "topk", "moe_ffn_hidden_size")
    yield from at_least(0, model, "moe_shared_expert_intermediate_size", "moe_min_capacity")
    if min(model.expert_interval, model.topk, *model.num_experts) < 1:
        if min(model.num_experts) < 1:
            yield Problem(
                "a layer without experts", found=f"--num-experts {_words(model.num_experts)}",
                expected="1 (an ordinary MLP) or more", flags=("--num-experts",),
            )  # fmt: skip
        return
    if max(model.num_experts) <= 1:
        return
    num_layers = len(model.moe_layers)
    if num_layers == 0:
        yield Problem(
            "no block has experts",
            found=f"--expert-interval {model.expert_interval} with --num-layers {model.num_layers}",
            expected="an interval of at most the blocks",
            flags=("--expert-interval", "--num-layers"),
            fix=f"--expert-interval of 1 to {model.num_layers}",
        )
    elif len(model.num_experts) not in (1, num_layers):
        yield Problem(
            "the numbers of experts do not fit the MoE layers",
            found=f"--num-experts {_words(model.num_experts)} for blocks {_words(model.moe_layers)}",
            expected=f"one number, or {num_layers}",
            flags=("--num-experts", "--expert-interval"),
            fix=f"give one number for all, or one for each of the {num_layers} blocks",
        )
    fewest = min(n for n in model.num_experts if n > 1)
    if model.topk > fewest:
        yield Problem(
            "a token cannot be sent to more experts than there are",
            found=f"--topk {model.topk} with --num-experts {_words(model.num_experts)}",
            expected=f"1 to {fewest}",
            flags=("--topk", "--num-experts"),
            fix=f"--topk of at most {fewest}",
        )
    yield from within(0.0, 1.0, model, "moe_router_jitter", is_open_above=True)
    yield from within(0.0, 1.0, model, "moe_sparsemixer_eps")
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_train_capacity_factor", "moe_eval_capacity_factor"):
        value = getattr(model, name)
        if value is not None and (value < 0 or (value == 0 and "capacity" in name)):
            yield Problem(
                f"{flag_of(name)} is out of range", found=f"{value:g}",
                expected="more than 0" if "capacity" in name else "0 or more", flags=(flag_of(name),),
            )  # fmt: skip


def expert_parallel_problems(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    """Experts are dealt to consecutive data-parallel ranks, as many to each."""
    ep_size = parallel.moe_expert_parallel_size
    flags = ("--moe-expert-parallel-size", "--num-experts")
    if ep_size > 1 and not model.has_experts:
        yield Problem(
            "expert parallelism without experts", found=f"--moe-expert-parallel-size {ep_size}", flags=flags,
            fix="give --num-experts, or drop --moe-expert-parallel-size",
        )  # fmt: skip
        return
    zero_size = world_size // parallel.model_parallel_size * parallel.ds_sequence_parallel_size
    counts = [n for n in model.num_experts if n > 1]
    legal = divisors(math.gcd(zero_size, *counts)) if zero_size else [1]
    if zero_size and zero_size % ep_size:
        yield Problem(
            "experts cannot be dealt to the data parallel ranks",
            found=f"--moe-expert-parallel-size {ep_size} with {zero_size} data x sequence parallel ranks",
            expected=f"a divisor of {zero_size}",
            flags=flags[:1],
            fix="--moe-expert-parallel-size of " + nearest(legal, ep_size),
        )
    elif any(n % ep_size for n in counts):
        yield Problem(
            f"experts cannot be dealt to {ep_size} ranks, as many to each",
            found=f"--num-experts {_words(model.num_experts)} with --moe-expert-parallel-size {ep_size}",
            expected=f"a multiple of {ep_size}",
            flags=flags,
            fix="--moe-expert-parallel-size of " + nearest(legal, ep_size),
        )


def _words(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def parallel_problems(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    degrees = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "ds_sequence_parallel_size",
               "moe_expert_parallel_size")  # fmt: skip
    yield from at_least(1, parallel, *degrees)
    if min(getattr(parallel, degree) for degree in degrees) < 1:
        return
    tp_size, pp_size = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    problem = parallel.world_size_problem(world_size)
    if problem is not None:
        yield problem
    legal = legal_tensor_sizes(model)
    if legal and tp_size not in legal:  # none: a size is less than 1, which is said already
        yield Problem(
            f"the model cannot be cut over {tp_size} tensor parallel ranks: each needs a query head, and some features "
            "of the keys and of every MLP",
            found=f"--tensor-model-parallel-size {tp_size} with {model.num_attention_heads} query heads, "
            f"{model.num_key_value_heads} key/value heads of {model.head_dim} features, MLPs of "
            + " and ".join(str(width) for width in sorted(set(_mlp_widths(model)))),
            expected=f"at most {max(legal)}",
            flags=("--tensor-model-parallel-size", "--num-attention-heads"),
            fix="--tensor-model-parallel-size of " + nearest(legal, tp_size),
        )
    if parallel.world_size_problem(world_size) is None:
        yield from expert_parallel_problems(model, parallel, world_size)
    yield from _sequence_problems(model, parallel)
    if pp_size > model.num_layers:
        yield Problem(
            "more pipeline stages than blocks",
            found=f"--pipeline-model-parallel-size {pp_size} with --num-layers {model.num_layers}",
            expected="at least one block a stage",
            flags=("--pipeline-model-parallel-size", "--num-layers"),
            fix=f"--pipeline-model-parallel-size of at most {model.num_layers}",
        )
    method = parallel.pp_partition_method
    if method not in ("uniform", "parameters") and not method.startswith("type:"):
        yield Problem(
            "unknown way of dealing the model to pipeline stages",
            found=f"--pp-partition-method {method}",
            expected="uniform, parameters, or type:REGEX",
            flags=("--pp-partition-method",),
            fix="drop it: type:transformer gives every stage as many blocks",
        )
    if parallel.no_pipeline_parallel and pp_size > 1:
        yield Problem(
            "--no-pipeline-parallel with several pipeline stages",
            found=f"--pipeline-model-parallel-size {pp_size}",
            expected="1",
            flags=("--no-pipeline-parallel", "--pipeline-model-parallel-size"),
            fix="drop one of the two",
        )
    stage = parallel.zero_stage
    if stage >= 2 and pp_size > 1:
        yield Problem(
            f"DeepSpeed's pipeline engine refuses ZeRO-{stage}: it accumulates gradients over micro batches",
            found=f"--zero-stage {stage} with --pipeline-model-parallel-size {pp_size}",
            expected="ZeRO-0 or ZeRO-1 with pipeline stages",
            flags=("--zero-stage", "--pipeline-model-parallel-size"),
            fix="--zero-stage 1, or --pipeline-model-parallel-size 1 with more tensor or data parallelism",
        )


def _sequence_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    tp_size, sp_size, length = (
        parallel.tensor_model_parallel_size, parallel.ds_sequence_parallel_size, model.seq_length,
    )  # fmt: skip
    legal = legal_sequence_sizes(model, tp_size)
    if sp_size > 1 and sp_size not in legal:
        yield Problem(
            f"heads or sequence cannot be cut into {sp_size} equal parts (Ulysses: a rank has a chunk of the sequence, "
            "then some heads of all of it)",
            found=f"--ds-sequence-parallel-size {sp_size} with {model.num_attention_heads} query and "
            f"{model.num_key_value_heads} key/value heads on {tp_size} tensor parallel ranks, --seq-length {length}",
            expected=f"a divisor of both heads / {tp_size} and of the sequence length",
            flags=("--ds-sequence-parallel-size",),
            fix="--ds-sequence-parallel-size of " + nearest(legal, sp_size),
        )
    elif parallel.sequence_parallel and length % (sp_size * tp_size):
        step = sp_size * tp_size
        below = length // step * step
        yield Problem(
            f"--sequence-parallel cannot cut a sequence into {tp_size} equal parts",
            found=f"--seq-length {length} with --tensor-model-parallel-size {tp_size} and "
            f"--ds-sequence-parallel-size {sp_size}",
            expected=f"a multiple of {step}",
            flags=("--sequence-parallel", "--seq-length"),
            fix=f"--seq-length {' or '.join(str(n) for n in (below, below + step) if n)}, or drop --sequence-parallel",
        )
