"""Checks of the model, of how it is cut, and of the batch: one generator per subject, which never stops early.

The one idea: a problem lists the legal values nearest to what was asked, so the next command line is right.

    problems = [*model_problems(config.model), *parallel_problems(config.model, config.parallel, world_size=8)]
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron.config.checking import at_least, divisors, flag_of, nearest, within
from megatron.config.errors import Problem
from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig

NOT_BUILT = "not built yet"


def legal_tensor_sizes(model: ModelConfig) -> list[int]:
    """Tensor parallel sizes into which this model's heads and MLP can be cut."""
    return divisors(math.gcd(model.num_attention_heads, model.num_key_value_heads, model.ffn_hidden_size))


def legal_sequence_sizes(model: ModelConfig, tp_size: int) -> list[int]:
    """Ulysses degrees: a tp rank's heads and the sequence are cut."""
    heads = math.gcd(model.num_attention_heads, model.num_key_value_heads)
    return divisors(math.gcd(heads // tp_size, model.seq_length)) if heads % tp_size == 0 else [1]


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "ffn_hidden_size",
             "num_key_value_heads", "max_position_embeddings", "make_vocab_size_divisible_by",
             "recompute_num_layers")  # fmt: skip
    yield from at_least(1, model, *sizes)
    if model.vocab_size is not None:
        yield from at_least(1, model, "vocab_size")
    if min(getattr(model, size) for size in sizes) < 1:
        return  # What follows divides by these.
    if model.hidden_size % model.num_attention_heads:
        yield Problem(
            "heads do not divide the hidden size",
            found=f"--hidden-size {model.hidden_size} with --num-attention-heads {model.num_attention_heads}",
            expected="hidden size a multiple of the heads",
            flags=("--hidden-size", "--num-attention-heads"),
            fix="heads of " + nearest(divisors(model.hidden_size), model.num_attention_heads),
        )
    elif model.kv_channels != model.head_dim:
        yield Problem(
            "a head of another size than hidden / heads is " + NOT_BUILT,
            found=f"--kv-channels {model.kv_channels}",
            expected=str(model.head_dim),
            flags=("--kv-channels",),
            fix="drop --kv-channels",
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
    if model.seq_length > model.max_position_embeddings:
        yield Problem(
            "the sequence is longer than the position table",
            found=f"--seq-length {model.seq_length} with --max-position-embeddings {model.max_position_embeddings}",
            expected="a sequence length of at most the positions",
            flags=("--seq-length", "--max-position-embeddings"),
            fix=f"--max-position-embeddings {model.seq_length}",
        )
    yield from within(0.0, 1.0, model, "hidden_dropout", "attention_dropout")
    if model.recompute_method is not None and model.recompute_granularity != "full":
        yield Problem(
            "--recompute-method needs --recompute-granularity full",
            found=f"--recompute-granularity {model.recompute_granularity}",
            flags=("--recompute-method", "--recompute-granularity"),
            fix="add --recompute-granularity full, or drop --recompute-method",
        )
    yield from _unbuilt_model(model)


def _unbuilt_model(model: ModelConfig) -> Iterator[Problem]:
    """Features that parse and are not there yet; a row goes when its feature comes."""
    rows = (
        (model.swiglu, "--swiglu", "SwiGLU", "drop it: the MLP is GELU"),
        (model.normalization != "layernorm", "--normalization", f"{model.normalization}", "--normalization layernorm"),
        (model.use_rotary_position_embeddings, "--use-rotary-position-embeddings", "rotary positions", "drop it"),
        (model.position_embedding_type != "learned_absolute", "--position-embedding-type",
         f"positions of type {model.position_embedding_type}", "--position-embedding-type learned_absolute"),
        (not model.add_position_embedding and not model.use_rotary_position_embeddings
         and model.position_embedding_type == "learned_absolute",
         "--no-position-embedding", "a model without positions", "drop it"),
        (any(n > 1 for n in model.num_experts), "--num-experts", "mixture of experts", "--num-experts 1"),
    )  # fmt: skip
    for is_asked, name, what, fix in rows:
        if is_asked:
            yield Problem(f"{what}: {NOT_BUILT}", found=name, flags=(name,), fix=fix)


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
    cuts = (("num_attention_heads", "query heads"), ("num_key_value_heads", "key/value heads"),
            ("ffn_hidden_size", "MLP features"))  # fmt: skip
    for name, what in cuts:
        size = getattr(model, name)
        if size >= 1 and size % tp_size:
            yield Problem(
                f"{what} cannot be cut into {tp_size} equal parts",
                found=f"{flag_of(name)} {size} with --tensor-model-parallel-size {tp_size}",
                expected=f"a multiple of {tp_size}",
                flags=(flag_of(name), "--tensor-model-parallel-size"),
                fix="--tensor-model-parallel-size of " + nearest(legal_tensor_sizes(model), tp_size),
            )
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
    rows = (
        (parallel.moe_expert_parallel_size > 1, "--moe-expert-parallel-size", "expert parallelism",
         "--moe-expert-parallel-size 1"),
        (parallel.create_moe_param_group, "--create-moe-param-group", "mixture of experts", "drop it"),
    )  # fmt: skip
    for is_asked, name, what, fix in rows:
        if is_asked:
            yield Problem(f"{what}: {NOT_BUILT}", found=name, flags=(name,), fix=fix)


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


def batch_problems(run: RunConfig, parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    yield from at_least(1, run, "micro_batch_size")
    if run.global_batch_size is None or run.micro_batch_size < 1 or parallel.model_parallel_size < 1:
        return
    yield from at_least(1, run, "global_batch_size")
    dp_size = world_size // parallel.model_parallel_size
    step = run.micro_batch_size * dp_size
    if dp_size >= 1 and run.global_batch_size >= 1 and run.global_batch_size % step:
        below = run.global_batch_size // step * step
        legal = [n for n in divisors(run.global_batch_size) if run.global_batch_size % (n * dp_size) == 0]
        fix = f"--global-batch-size {' or '.join(str(n) for n in (below, below + step) if n)}"
        if legal:
            fix += ", or --micro-batch-size of " + nearest(legal, run.micro_batch_size)
        yield Problem(
            "the global batch is not a multiple of micro batch x data parallel size",
            found=f"--global-batch-size {run.global_batch_size} with --micro-batch-size {run.micro_batch_size} "
            f"on {dp_size} data parallel ranks",
            expected=f"a multiple of {step} = {run.micro_batch_size} x {dp_size}",
            flags=("--global-batch-size", "--micro-batch-size"),
            fix=fix,
        )
