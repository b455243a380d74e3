"""Checks of the optimizer, the schedule, the length of the run, the checkpoints and the data.

problems = [*optimizer_problems(config.optimizer, config.run), *run_problems(config.run)]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.config.checking import at_least, flag_of, within
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import TOKENIZER_FILES, DataConfig
from megatron.config.errors import Problem
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig


def optimizer_problems(optimizer: OptimizerConfig, run: RunConfig) -> Iterator[Problem]:
    if optimizer.lr is None:
        yield Problem("--lr is missing", flags=("--lr",), fix="give --lr FLOAT (peak learning rate)")
    elif optimizer.lr <= 0:
        yield Problem("the learning rate is not positive", found=f"--lr {optimizer.lr:g}", flags=("--lr",))
    for name in ("min_lr", "lr_warmup_init"):
        value = getattr(optimizer, name)
        if value < 0 or (optimizer.lr is not None and value > optimizer.lr):
            peak = "nothing" if optimizer.lr is None else f"{optimizer.lr:g}"
            yield Problem(
                f"{flag_of(name)} is outside 0..lr",
                found=f"{flag_of(name)} {value:g} with --lr {peak}",
                expected="0 <= value <= --lr",
                flags=(flag_of(name), "--lr"),
            )
    yield from _decoupled_problems(optimizer)
    rates = ("adam_beta1", "adam_beta2", "lion_beta1", "lion_beta2", "muon_momentum", "sgd_momentum")
    yield from within(0.0, 1.0, optimizer, *rates, is_open_above=True)
    for name in ("weight_decay", "clip_grad", "adam_eps", "loss_scale"):
        value = getattr(optimizer, name)
        if value is not None and value < 0:
            yield Problem(
                f"{flag_of(name)} is negative", found=f"{value:g}", expected="0 or more", flags=(flag_of(name),)
            )
    yield from at_least(0, optimizer, "lr_warmup_iters", "lr_warmup_samples")
    yield from _schedule_problems(optimizer, run)
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    is_constant = optimizer.weight_decay_incr_style == "constant"
    if is_constant != (start is None and end is None) or (start is None) != (end is None):
        yield Problem(
            "--weight-decay-incr-style and its ends do not fit",
            found=f"{optimizer.weight_decay_incr_style} from {start} to {end}",
            expected="constant with neither --start-weight-decay nor --end-weight-decay, else both",
            flags=("--weight-decay-incr-style", "--start-weight-decay", "--end-weight-decay"),
        )
    elif start is not None and not 0 <= start <= end:
        yield Problem(
            "weight decay does not rise",
            found=f"from {start:g} to {end:g}",
            expected="0 <= start <= end",
            flags=("--start-weight-decay", "--end-weight-decay"),
        )
    for name in ("initial_loss_scale", "min_loss_scale"):
        scale = getattr(optimizer, name)
        if scale <= 0 or not math.log2(scale).is_integer():
            yield Problem(
                f"{flag_of(name)} is not a power of two",
                found=f"{scale:g}",
                expected="1, 2, 4, ...",
                flags=(flag_of(name),),
            )
    if optimizer.override_opt_param_scheduler and optimizer.use_checkpoint_opt_param_scheduler:
        yield Problem(
            "the schedule cannot come from the flags and from the checkpoint",
            flags=("--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"),
            fix="drop one of the two",
        )


def _decoupled_problems(optimizer: OptimizerConfig) -> Iterator[Problem]:
    lr, least = optimizer.decoupled_lr, optimizer.decoupled_min_lr
    flags = ("--decoupled-lr", "--decoupled-min-lr")
    if lr is None:
        if least is not None:
            yield Problem("--decoupled-min-lr without --decoupled-lr", flags=flags, fix="give --decoupled-lr too")
        return
    least = optimizer.min_lr if least is None else least
    if lr <= 0 or not 0 <= least <= lr:
        yield Problem(
            "the learning rate of the word embedding and the output layer does not fall from its peak",
            found=f"from --decoupled-lr {lr:g} to {least:g}",
            expected="0 <= --decoupled-min-lr (default: --min-lr) <= --decoupled-lr",
            flags=flags,
        )


def optimizer_topology_problems(
    optimizer: OptimizerConfig, parallel: ParallelConfig, model: ModelConfig
) -> Iterator[Problem]:
    """Optimizers whose arithmetic is not elementwise, where ranks have parts of matrices."""
    if optimizer.optimizer == "adafactor":
        tp_size, stage = parallel.tensor_model_parallel_size, parallel.zero_stage
        if tp_size > 1 or stage > 0 or optimizer.precision != "fp32":
            yield Problem(
                "Adafactor needs whole matrices: of a part of one its factored moment is another, so it would train "
                "differently under every topology",
                found=f"--tensor-model-parallel-size {tp_size} --zero-stage {stage} in {optimizer.precision}",
                expected="tp 1 and ZeRO-0, in fp32 since bf16 and fp16 are run under ZeRO-1; any dp and pp",
                flags=("--optimizer", "--zero-stage", "--tensor-model-parallel-size", "--bf16", "--fp16"),
                fix="--zero-stage 0 with --tensor-model-parallel-size 1, or --optimizer adam",
            )
    if optimizer.optimizer in ("adafactor", "muon") and model.has_experts:
        yield Problem(
            f"--optimizer {optimizer.optimizer} does not know experts: they stand in one tensor, not in matrices",
            found=f"--num-experts {' '.join(map(str, model.num_experts))}",
            flags=("--optimizer", "--num-experts"),
            fix="--optimizer adam",
        )


def _schedule_problems(optimizer: OptimizerConfig, run: RunConfig) -> Iterator[Problem]:
    """Units that do not fit, and lengths that leave nothing to decay; as upstream's own checks."""
    by_samples = run.train_samples is not None or run.rampup_batch_size is not None
    wrong_unit = "iters" if by_samples else "samples"
    stems = ("lr_decay", "lr_warmup", "lr_wsd_decay")
    odd = [flag_of(f"{stem}_{wrong_unit}") for stem in stems if getattr(optimizer, f"{stem}_{wrong_unit}")]
    if odd and (by_samples or run.train_iters is not None):
        right = "samples" if by_samples else "iters"
        yield Problem(
            f"a run in {right} has its schedule in {wrong_unit}",
            found=", ".join(odd),
            expected=f"--lr-...-{right} with --train-{right}",
            flags=tuple(odd),
            fix=f"give them in {right}",
        )
    warmups = [
        name
        for name in ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens")
        if getattr(optimizer, name)
    ]
    if len(warmups) > 1:
        yield Problem(
            "the warm-up is given more than once",
            found=", ".join(map(flag_of, warmups)),
            expected="one of them",
            flags=tuple(map(flag_of, warmups)),
        )
    unit = "samples" if by_samples else "iters"
    decay = getattr(optimizer, f"lr_decay_{unit}")
    decay = getattr(run, f"train_{unit}") if decay is None else decay
    warmup = getattr(optimizer, f"lr_warmup_{unit}")
    flags = (f"--lr-warmup-{unit}", f"--lr-decay-{unit}", f"--train-{unit}")
    if decay is not None and warmup >= decay > 0 and optimizer.lr_decay_tokens is None:
        yield Problem(
            "the warm-up leaves nothing to decay",
            found=f"--lr-warmup-{unit} {warmup} of {decay}",
            expected="a warm-up shorter than the decay, which counts from the first iteration",
            flags=flags,
            fix=f"--lr-warmup-{unit} of at most {decay - 1}, or a longer --lr-decay-{unit}",
        )
    if optimizer.lr_warmup_fraction is not None and not 0 <= optimizer.lr_warmup_fraction < 1:
        yield Problem(
            "the warm-up leaves nothing to decay",
            found=f"--lr-warmup-fraction {optimizer.lr_warmup_fraction:g}",
            expected="0 <= fraction < 1",
            flags=("--lr-warmup-fraction",),
        )
    if optimizer.lr_decay_style == "WSD":
        length = getattr(optimizer, f"lr_wsd_decay_{unit}")
        if length is None or length < 1 or (decay is not None and length > decay):
            yield Problem(
                "WSD needs the length of its last part",
                found=f"--lr-wsd-decay-{unit} {length} of {decay}",
                expected="1 to the length of the decay",
                flags=(f"--lr-wsd-decay-{unit}",),
                fix=f"give --lr-wsd-decay-{unit}",
            )


def run_problems(run: RunConfig) -> Iterator[Problem]:
    lengths = ("--train-iters", "--train-samples", "--train-tokens")
    if run.train_iters is None and run.train_samples is None and run.train_tokens is None:
        yield Problem("the length of the run is missing", flags=lengths, fix="give --train-iters or --train-samples")
    if run.train_iters is not None and run.train_samples is not None:
        yield Problem(
            "the length of the run is given twice",
            found=f"--train-iters {run.train_iters} and --train-samples {run.train_samples}",
            expected="one of them",
            flags=lengths[:2],
        )
    for name in (
        "train_iters",
        "train_samples",
        "train_tokens",
        "exit_interval",
        "exit_duration_in_mins",
        "verify_state_every",
        "exit_signal_grace",
    ):
        if getattr(run, name) is not None:
            yield from at_least(1, run, name)
    if run.exit_signal_grace is not None and not run.exit_signal_handler:
        yield Problem(
            "--exit-signal-grace without --exit-signal-handler",
            flags=("--exit-signal-grace", "--exit-signal-handler"),
            fix="give --exit-signal-handler",
        )
    if run.go_back_on_state_change and run.verify_state_every is None:
        yield Problem(
            "--go-back-on-state-change without --verify-state-every",
            flags=("--go-back-on-state-change", "--verify-state-every"),
            fix="give --verify-state-every 100",
        )
    yield from at_least(1, run, "log_interval", "eval_interval", "distributed_timeout_minutes")
    yield from at_least(0, run, "eval_iters", "seed")
    if run.deepspeed_config is not None:
        yield from _json_problems(run.deepspeed_config)
    try:
        first, last = run.profiled_steps
        is_fine = 1 <= first <= last
    except ValueError:
        is_fine = False
    if not is_fine:
        yield Problem(
            "--profile_steps is no range of steps",
            found=run.profile_steps,
            expected="FIRST,LAST such as 2,3",
            flags=("--profile_steps",),
        )


def _json_problems(path: str) -> Iterator[Problem]:
    flags = ("--deepspeed_config",)
    try:
        value: Any = json.loads(Path(path).read_text())
    except OSError as error:
        yield Problem(
            "the DeepSpeed configuration cannot be read",
            found=f"{path}: {error.strerror}",
            flags=flags,
            fix="give an existing JSON file, or drop the flag: it is computed from the flags",
        )
    except ValueError as error:
        yield Problem("the DeepSpeed configuration is not JSON", found=f"{path}: {error}", flags=flags)
    else:
        if not isinstance(value, dict):
            yield Problem("the DeepSpeed configuration is not a JSON object", found=path, flags=flags)


def checkpoint_problems(checkpoint: CheckpointConfig, run: RunConfig) -> Iterator[Problem]:
    if checkpoint.save is not None and checkpoint.save_interval is None:
        yield Problem(
            "--save without --save-interval",
            found=f"--save {checkpoint.save}",
            flags=("--save", "--save-interval"),
            fix="give --save-interval ITERATIONS",
        )
    if checkpoint.save_interval is not None:
        yield from at_least(1, checkpoint, "save_interval")
    if checkpoint.async_save and checkpoint.save is None:
        yield Problem("--async-save without --save", flags=("--async-save", "--save"), fix="give --save RUN_FOLDER")
    if run.go_back_on_state_change and checkpoint.save is None:
        yield Problem(
            "--go-back-on-state-change without --save",
            flags=("--go-back-on-state-change", "--save"),
            fix="give --save RUN_FOLDER",
        )
    for name in ("async_save_max_gib", "exit_on_save_failure"):
        if getattr(checkpoint, name) and not checkpoint.async_save:
            yield Problem(
                f"{flag_of(name)} without --async-save", flags=(flag_of(name), "--async-save"), fix="give --async-save"
            )
    if checkpoint.keep_newest_verified and checkpoint.keep_last is None:
        yield Problem(
            "--keep-newest-verified without --keep-last",
            flags=("--keep-newest-verified", "--keep-last"),
            fix="give --keep-last 3",
        )
    for name, other in (("keep_last", "save"), ("keep_every", "keep_last")):
        if getattr(checkpoint, name) is not None:
            yield from at_least(1, checkpoint, name)
            if getattr(checkpoint, other) is None:
                yield Problem(
                    f"{flag_of(name)} without {flag_of(other)}",
                    flags=(flag_of(name), flag_of(other)),
                    fix=f"give {flag_of(other)}",
                )
    if (every := checkpoint.export_hf_interval) is not None:
        yield from at_least(1, checkpoint, "export_hf_interval")
        if checkpoint.save is None or every % (checkpoint.save_interval or every) or not checkpoint.save_interval:
            yield Problem(
                "--export-hf-interval is no multiple of --save-interval",
                found=f"{every}, {checkpoint.save_interval}",
                flags=("--export-hf-interval", "--save-interval", "--save"),
            )
    if checkpoint.async_save_max_gib is not None:
        yield from within(0.0, math.inf, checkpoint, "async_save_max_gib")
    for name in ("universal_checkpoint", "load_tag", "finetune", "load_strict", "exit_on_missing_checkpoint"):
        if getattr(checkpoint, name) and checkpoint.load is None:
            yield Problem(
                f"{flag_of(name)} without --load", flags=(flag_of(name), "--load"), fix="give --load RUN_FOLDER"
            )


def data_problems(data: DataConfig, model: ModelConfig) -> Iterator[Problem]:
    yield from at_least(0, data, "num_workers")
    if not data.data_path:
        yield Problem(
            "--data-path is missing",
            flags=("--data-path",),
            fix="give the dataset's prefix: --data-path training_datasets/gpt2_text_document",
        )
    else:
        yield from _blend_problems(data)
    yield from _split_problems(data)
    for name in TOKENIZER_FILES[data.tokenizer_type]:
        path, flags = getattr(data, name), (flag_of(name), "--tokenizer-type")
        if path is None:
            yield Problem(
                f"{flag_of(name)} is missing",
                found=f"--tokenizer-type {data.tokenizer_type}",
                flags=flags,
                fix=f"give {flag_of(name)} PATH",
            )
        elif not Path(path).exists() and not _is_hub_name(data.tokenizer_type, path):
            yield Problem(f"the file of {flag_of(name)} does not exist", found=str(Path(path).absolute()), flags=flags)
    if data.tokenizer_type == "NullTokenizer" and (model.vocab_size is None or model.vocab_size < 2):
        yield Problem(
            "a NullTokenizer does not know how many words there are",
            flags=("--vocab-size", "--tokenizer-type"),
            fix="give --vocab-size",
        )


def _is_hub_name(tokenizer_type: str, path: str) -> bool:
    """ "HuggingFaceTB/SmolLM2-135M", which may be in the hub's cache: who builds the tokenizer finds out."""
    is_known = tokenizer_type in ("HFTokenizer", "PretrainedFromHF", "HuggingFaceTokenizer")
    return is_known and re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not path.startswith(".")


def _blend_problems(data: DataConfig) -> Iterator[Problem]:
    from megatron.data.errors import BlendError  # late: see DataConfig.blend

    try:
        entries = data.blend
    except BlendError as error:
        yield Problem(
            error.what,
            found=" ".join(data.data_path),
            expected="PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ... with weights from 0 on, not all 0",
            flags=("--data-path",),
        )
        return
    for entry in entries:
        yield from _dataset_problems(entry.prefix)


def _dataset_problems(prefix: str) -> Iterator[Problem]:
    missing = [prefix + suffix for suffix in (".bin", ".idx") if not Path(prefix + suffix).exists()]
    if not missing:
        return
    fix = "make it with tools/preprocess_data.py"
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix) and Path(prefix).exists():
            fix = f"--data-path takes the prefix: {prefix.removesuffix(suffix)}"
    yield Problem(
        "a file of the dataset does not exist",
        found=", ".join(str(Path(path).absolute()) for path in missing),
        expected="PREFIX.bin and PREFIX.idx",
        flags=("--data-path",),
        fix=fix,
    )


def _split_problems(data: DataConfig) -> Iterator[Problem]:
    try:
        weights = data.split_weights
    except ValueError:
        weights = ()
    if len(weights) != 3 or min(weights) < 0 or weights[0] <= 0:
        yield Problem(
            "--split is not three proportions with some training data",
            found=data.split,
            expected="such as 949,50,1",
            flags=("--split",),
        )
