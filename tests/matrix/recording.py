"""Runs for the matrix: the real command line, the real data path, a tiny model, and every number recorded.

flags = Flags(data_prefix).of(tp=2, zero=1, save="...")
curves = train(flags)          # inside run_ranks: losses, grad norms, digests
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

VOCAB_SIZE = 101  # odd, so that every tp_size pads it differently
NUM_DOCUMENTS = 40


@dataclass
class RecordingLog:
    """Stands in for RunLog: keeps each step's metrics instead of writing events."""

    steps: list = field(default_factory=list)
    validations: list = field(default_factory=list)
    saves: list = field(default_factory=list)
    """(iteration, stage) of saves behind training."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def step(self, metrics) -> None:
        self.steps.append(metrics)

    def rate(self, iteration, rate) -> None:
        pass

    def expert_shares(self, step) -> None:
        pass

    def times(self, iteration, seconds) -> None:
        pass

    def save(self, iteration, stage, seconds) -> None:
        self.saves.append((iteration, stage))

    def validation(self, iteration, samples, tokens, loss) -> None:
        self.validations.append((iteration, loss))

    def go_back(self, progress) -> None:
        self.steps = [step for step in self.steps if step.iteration <= progress.iteration]


@dataclass(frozen=True)
class Curves:
    losses: dict[int, float]
    grad_norms: dict[int, float]
    learning_rates: dict[int, float]
    validations: list
    digests: dict


def write_dataset(
    prefix: Path, seed: int = 0, num_documents: int = NUM_DOCUMENTS, vocab_size: int = VOCAB_SIZE
) -> Path:
    """A small MMIDIDX dataset with learnable structure (each token depends on the one before)."""
    from megatron.data.indexed_dataset import IndexedDatasetWriter

    generator = np.random.default_rng(seed)
    table = generator.permutation(vocab_size - 1)
    with IndexedDatasetWriter(prefix, dtype=np.uint16) as writer:
        for _ in range(num_documents):
            tokens = [int(generator.integers(vocab_size - 1))]
            for _ in range(int(generator.integers(50, 200))):
                follows = generator.random() < 0.8
                tokens.append(int(table[tokens[-1]] if follows else generator.integers(vocab_size - 1)))
            writer.add_document([*tokens, vocab_size - 1])
    return prefix


def listen(logger: str) -> list[str]:
    """What it says from here on in this process."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger(logger).setLevel(logging.INFO)
    logging.getLogger(logger).addHandler(handler)
    return told


def command_line(data: Path, *, tp=1, pp=1, zero=0, micro_batch=1, iters=4, **flags) -> list[str]:
    """Underscores in `flags` become dashes; True gives the bare flag, None leaves it out."""
    values = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "zero_stage": zero,
        "micro_batch_size": micro_batch,
        "global_batch_size": 8,
        "train_iters": iters,
        "lr_decay_iters": 16,
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "make_vocab_size_divisible_by": 8,
        "vocab_size": VOCAB_SIZE - 1,  # the words of a NullTokenizer, which adds the end of a document
        "tokenizer_type": "NullTokenizer",
        "data_path": data,
        "split": "90,10,0",
        "lr": 1e-2,
        "min_lr": 1e-3,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": 2,
        "weight_decay": 0.1,
        "clip_grad": 0.5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "log_interval": 100,
        "eval_iters": 0,
        "eval_interval": 1000,
        "num_workers": 0,
        "seed": 1234,
        "save_interval": 1000 if "save" in flags else None,
        "distributed_backend": "gloo",
        "deepspeed": True,
        **flags,
    }
    line: list[str] = []
    for name, value in values.items():
        option = name if name == "deepspeed_config" else name.replace("_", "-")
        if value is True:
            line.append(f"--{option}")
        elif value is not None and value is not False:
            line += [f"--{option}", *map(str, value if isinstance(value, tuple) else [value])]
    return line


def build(argv: list[str], rank: int, world_size: int):
    from megatron.config.arguments import parse
    from megatron.training.build import build_run
    from megatron.training.launch import LaunchInfo

    config = parse(argv).config.validate(world_size)
    run = build_run(config, LaunchInfo(rank=rank, local_rank=rank, world_size=world_size))
    run.run_log = RecordingLog()
    return run


def train(rank: int, world_size: int, argv: list[str]) -> Curves:
    """The body of a rank: build, fit, and what was seen."""
    from megatron.checkpoint.state_digest import state_digests
    from megatron.training.loop import fit

    run = build(argv, rank, world_size)
    fit(run)
    return curves(run, state_digests(run.live.state))


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on a CPU that has no instructions for it; such a CPU can compute it all the same, slowly.
    This answers for the accelerator that it can."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float, torch.bfloat16, torch.half]


def curves(run, digests) -> Curves:
    steps = run.run_log.steps
    return Curves(
        {s.iteration: s.loss for s in steps},
        {s.iteration: s.grad_norm for s in steps},
        {s.iteration: s.learning_rate for s in steps},
        run.run_log.validations,
        digests,
    )
