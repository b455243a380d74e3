"""From a configuration to a run that is ready to train: data, model, engine, and what it resumes from.

run = build_run(config, launch)      # collective; raises before training starts, never half way
fit(run)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

import megatron
from megatron.checkpoint.errors import DamagedCheckpointError
from megatron.checkpoint.live_run import LiveRun
from megatron.checkpoint.loading import load
from megatron.checkpoint.progress import Progress
from megatron.checkpoint.restoring import progress_of
from megatron.checkpoint.resume import LoadOptions, ResumeError, ResumePlan
from megatron.config.config import Config
from megatron.config.errors import ConfigError, Problem
from megatron.config.model import ModelConfig
from megatron.data.tokenizer import Tokenizer, TokenizerSpec
from megatron.engine.ds_config import deepspeed_config
from megatron.engine.engine import build_engine, partitioned_construction, write_shard
from megatron.engine.expert_groups import register_expert_groups
from megatron.engine.schedule import LearningRateSchedule
from megatron.engine.step_times import StepTimes
from megatron.kernels.kernels import choose
from megatron.layers.router_ledger import RouterLedger
from megatron.model.build import build_model, parameter_layouts
from megatron.model.compiled import compile_blocks
from megatron.model.flops import flops_per_token, num_parameters
from megatron.parallel.agreement import stops_all_ranks
from megatron.parallel.context import ParallelContext, build_context
from megatron.parallel.mpu import Mpu
from megatron.parallel.rng import RandomStreams
from megatron.training.batches import Batches
from megatron.training.launch import LaunchInfo
from megatron.training.loop import Run
from megatron.training.metrics import peak_tflops
from megatron.training.starting_point import StartingPoint
from megatron.training.tensorboard import RunLog
from megatron.training.trainable import freeze, parameters_trained_later, refuse_buffers
from megatron.ucp.commit import RUN_MARK, end_replacements
from megatron.ucp.naming.gpt_model import OF_SCALING, SETTINGS
from megatron.ucp.owner import claimed

log = logging.getLogger(__name__)


def build_run(config: Config, launch: LaunchInfo) -> Run:
    """Collective over the world; torch.distributed is up and `config` is validated. Raises ConfigError, ResumeError,
    data errors and checkpoint errors before the first step."""
    ownership = _own(config.checkpoint.save, launch.rank)
    try:
        return _build(config, launch, ownership)
    except BaseException:
        ownership.close()
        raise


def _build(config: Config, launch: LaunchInfo, ownership: contextlib.ExitStack) -> Run:
    with stops_all_ranks("reading the tokenizer"):
        tokenizer = _tokenizer(config)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if config.model.pad_vocab_size_to is not None:
        if config.model.pad_vocab_size_to < vocab_size:
            raise ConfigError(
                Problem(
                    "--pad-vocab-size-to is smaller than the vocabulary",
                    found=f"{config.model.pad_vocab_size_to} for {vocab_size} tokens",
                    flags=("--pad-vocab-size-to",),
                )
            )
        vocab_size = config.model.pad_vocab_size_to
    model_config = dataclasses.replace(config.model, vocab_size=vocab_size)
    config = dataclasses.replace(config, model=model_config)
    topology = config.parallel.topology(launch.world_size)
    user_json = _read_json(config.run.deepspeed_config)
    ds_config, notes = deepspeed_config(config, topology, user_json)
    for note in notes:
        log.info("note: %s", note)
    zero_stage = ds_config["zero_optimization"]["stage"]
    starting_point = StartingPoint(config.checkpoint, topology, zero_stage)
    plan = starting_point.first()
    with stops_all_ranks("reading how far the checkpoint had come"):
        start = _start(config, plan)
        config.require_batch_sizes(launch.world_size, start.consumed_train_samples)
    context = build_context(topology, config.parallel.sequence_parallel)
    streams = RandomStreams(config.run.seed, context)
    context = register_expert_groups(context, zero_stage)
    kernels = choose(config.run.fused_kernels, get_accelerator().device_name())
    log.info("kernels: %s", kernels.described())
    ledger = RouterLedger()
    with stops_all_ranks("reading the dataset"):
        batches = Batches(config, context, eod=tokenizer.eod, start=start)
    mpu = Mpu(context)
    construction = partitioned_construction(ds_config, mpu)
    model = build_model(
        config.model, config.parallel, context, streams, config.run.seed, construction, kernels, ledger, write_shard
    )
    with stops_all_ranks("building the model"):
        layouts = parameter_layouts(model)
        refuse_buffers(model)
    if config.run.torch_compile:
        log.info("torch.compile: %d blocks on this rank, at their first use", compile_blocks(model))
    freeze(model, config.optimizer.freeze_parameters, context, but_adapters=config.model.lora_rank > 0)
    with stops_all_ranks("reading the checkpoint's parameter groups"):
        trained_later = _trained_later(config, plan)
    engine = build_engine(
        config.optimizer, model, context, mpu, ds_config, trained_later, fused_kernels=config.run.fused_kernels
    )
    schedule = LearningRateSchedule(config.optimizer, config.length.planned_samples, config.run.global_batch_size)
    schedule.attach(engine.optimizer)
    live = LiveRun.of(
        engine,
        context,
        layouts,
        streams,
        schedule,
        model=_identity(config.model),
        model_settings={name: getattr(config.model, name) for name in SETTINGS},
        train_order=batches.train_order(),
        batch_sizes=config.batch_sizes,
        padded_vocab_size=config.model.padded_vocab_size(topology.tp_size),
        excludes_frozen=config.checkpoint.exclude_frozen_parameters,
    )
    trained = sum(layout.numel for name, layout in live.atlas.layouts.items() if name not in live.atlas.frozen)
    log.info(
        "%s, ZeRO-%d, %s, %s parameters%s, %d ranks",
        topology,
        zero_stage,
        config.optimizer.precision,
        f"{num_parameters(config.model):,}",
        f" ({trained:,} trained)" if live.atlas.frozen else "",
        launch.world_size,
    )
    with stops_all_ranks("checking the optimizer"):
        live.state.check_optimizer(is_saved=config.checkpoint.save is not None)
    progress = Progress()
    while not plan.is_fresh:
        try:
            progress = load(live, plan, _load_options(config, plan))
            break
        except DamagedCheckpointError as error:
            plan = starting_point.instead_of(plan, error)
        changed = {name for name, _ in _trained_later(config, plan).items() ^ trained_later.items()}
        if changed - live.atlas.frozen:
            raise ResumeError(
                f"{plan.folder} is older than some parameters' training, which this run was built for: start again"
            )
        with stops_all_ranks("reading the dataset"):
            batches = Batches(config, context, eod=tokenizer.eod, start=_start(config, plan))
        live = dataclasses.replace(live, train_order=batches.train_order())
    with stops_all_ranks("opening --tensorboard-dir"):
        run_log = RunLog.open(
            config.run.tensorboard_dir,
            _describe(config, context, plan, zero_stage, progress),
            launch.rank,
            progress,
            {layer: config.model.num_experts_of(layer) for layer in config.model.moe_layers},
            config.run.tensorboard_queue_size,
        )
    return Run(
        config,
        live,
        batches,
        progress,
        run_log,
        flops_per_token(config.model),
        ledger,
        times=StepTimes(None if get_accelerator().device_name() == "cpu" else get_accelerator().synchronize),
        peak_tflops=config.estimate.peak_tflops or peak_tflops(config.optimizer.precision),
        ownership=ownership,
    )


def _tokenizer(config: Config) -> Tokenizer:
    data, vocab_size = config.data, config.model.vocab_size
    is_null = data.tokenizer_type == "NullTokenizer"
    return TokenizerSpec(
        data.tokenizer_type,
        data.vocab_file,
        data.merge_file,
        data.tokenizer_model,
        vocab_size - 1 if is_null and vocab_size else vocab_size,  # the words, without end of document
        data.tiktoken_pattern,
        data.tiktoken_num_special_tokens,
        data.tiktoken_special_tokens,
    ).build()


def _own(save: str | None, rank: int) -> contextlib.ExitStack:
    """A folder of saves belongs to one run at a time: two would replace each other's checkpoints. Collective. The owner
    is rank 0's process; its mark ends with it, whatever it dies of."""
    ownership = contextlib.ExitStack()
    with stops_all_ranks("taking the folder of --save"):
        if save and rank == 0:
            if not Path(save).exists():
                Path(save).mkdir(parents=True)
                ownership.callback(_remove_empty, Path(save))
            ownership.enter_context(claimed(Path(save) / RUN_MARK))
            for name in end_replacements(save):
                log.warning("warning: a save that was to replace %s was interrupted; the one before it is back", name)
    return ownership


def _remove_empty(folder: Path) -> None:
    """A run that was refused leaves nothing behind."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _start(config: Config, plan: ResumePlan) -> Progress:
    """How far the Source had come: the data must reach from there to the end."""
    if plan.opened is None or plan.weights_only:
        return Progress()
    return progress_of(plan.opened.source.manifest.common, config.batch_sizes)


def _trained_later(config: Config, plan: ResumePlan) -> dict[str, str]:
    """Parameters whose optimizer states began after the others', if any are loaded."""
    if plan.opened is None or not _load_options(config, plan).with_optimizer:
        return {}
    return parameters_trained_later(plan.opened.source.manifest)


def _load_options(config: Config, plan: ResumePlan) -> LoadOptions:
    checkpoint = config.checkpoint
    return LoadOptions(
        with_optimizer=not (checkpoint.no_load_optim or plan.weights_only),
        with_schedule=not (checkpoint.no_load_lr_state or plan.weights_only),
        with_rng=not (checkpoint.no_load_rng or plan.weights_only),
        with_progress=not plan.weights_only,
    )


def _identity(model: ModelConfig) -> dict[str, Any]:
    """What a Source must agree on: the values that decide the atomic parameters and the function they compute. Of
    parts that the model does not have, none."""
    names = [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "kv_channels",
        "vocab_size",
        "normalization",
        "layernorm_epsilon",
        "swiglu",
        "positions",
        "untie_embeddings_and_output_weights",
        "add_bias_linear",
        "qk_layernorm",
        "embed_layernorm",
        "use_parallel_residual",
        "has_qkv_bias",
        "has_attention_output_bias",
        "add_output_layer_bias",
    ]
    if model.positions == "learned_absolute":
        names.append("max_position_embeddings")
    if model.positions == "rope":
        names += ["rope_theta", "rotary_percent", "rope_scaling_type"]
        names += OF_SCALING[model.rope_scaling_type]
    names += ["exact_gelu"] if model.exact_gelu else []
    names += ["lora_rank", "lora_alpha", "lora_fused"] if model.lora_rank else []
    names += ["lora_projections"] if model.lora_rank else []
    identity = {name: getattr(model, name) for name in names}
    if model.has_experts:
        identity["num_experts"] = [model.num_experts_of(layer) for layer in range(model.num_layers)]
        of_experts = (
            "topk",
            "moe_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "moe_router_score_function",
            "moe_normalize_topk",
        )
        identity |= {name: getattr(model, name) for name in of_experts}
        if model.moe_router_score_function == "sparsemixer":
            identity["moe_sparsemixer_eps"] = model.moe_sparsemixer_eps
    return {name: list(value) if isinstance(value, tuple) else value for name, value in identity.items()}


def _describe(
    config: Config, context: ParallelContext, plan: ResumePlan, zero_stage: int, progress: Progress
) -> dict[str, Any]:
    """run.json: what the curves beside it are of."""
    resumed_from = None
    if not plan.is_fresh:
        resumed_from = {"folder": str(plan.folder), "iteration": progress.iteration, "kind": plan.kind}
    return {
        "role": "source" if plan.is_fresh else "target",
        "topology": str(context.topology),
        "topology_degrees": context.topology.to_json(),
        "zero_stage": zero_stage,
        "precision": config.optimizer.precision,
        "resumed_from": resumed_from,
        "commit": _commit(),
        "versions": {"megatron": megatron.__version__, "deepspeed": deepspeed.__version__, "torch": torch.__version__},
        "config": dataclasses.asdict(config),
    }


def _commit() -> str | None:
    """The commit of this source tree, where there is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _read_json(path: str | None) -> dict[str, Any] | None:
    return None if path is None else json.loads(Path(path).read_text())
