"""The trainers that benchmarks/train.py puts side by side: one process (or two ranks) each, a few steps at a time.

    python benchmarks/train_candidates.py '{"candidate": "plain loop", "rank": 0, ...}'     # started by train.py

All train one GPT from the same first weights on the same batches: AdamW with weight decay, gradients clipped at 1, one
loss a step. What differs is who does it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0


@dataclass(frozen=True)
class Candidate:
    """How one of them is run."""

    kind: str
    """ours, plain, trainer or fsdp."""
    ranks: int = 1
    flags: tuple[str, ...] = ()
    micro_batches: int = 1
    """On each data-parallel rank."""


CANDIDATES = {
    "plain loop": Candidate("plain"),
    "ours, ZeRO-0": Candidate("ours"),
    "ours, ZeRO-1": Candidate("ours", flags=("--zero-stage", "1")),
    "ours, compiled": Candidate("ours", flags=("--zero-stage", "1", "--torch-compile")),
    "HF Trainer": Candidate("trainer"),
    "FSDP2, 2 ranks": Candidate("fsdp", ranks=2),
    "ours, ZeRO-1, dp2": Candidate("ours", ranks=2, flags=("--zero-stage", "1")),
    "ours, ZeRO-2, dp2": Candidate("ours", ranks=2, flags=("--zero-stage", "2")),
    "ours, ZeRO-3, dp2": Candidate("ours", ranks=2, flags=("--zero-stage", "3")),
    "ours, TP2": Candidate("ours", ranks=2, flags=("--tensor-model-parallel-size", "2")),
    "ours, PP2": Candidate("ours", ranks=2, flags=("--pipeline-model-parallel-size", "2"), micro_batches=4),
}


@dataclass(frozen=True)
class Task:
    """What train.py asks of one process."""

    candidate: str
    rank: int
    port: int
    scratch: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int
    batch: int
    """Samples a step, of all ranks."""
    precision: str
    steps: int
    """In all: how many batches there are."""
    in_a_turn: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Turns:
    """Steps are taken `in_a_turn` at a time, when train.py says so; it is told what each turn cost, and the losses."""

    def __init__(self, in_a_turn: int) -> None:
        self._in_a_turn, self._taken = in_a_turn, 0
        self._losses: list[Any] = []
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever others print must not be taken for an answer

    def before_step(self) -> None:
        if self._taken:
            if self._taken % self._in_a_turn:
                self._taken += 1
                return
            seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
            self._answer({"seconds": seconds, "cpu": cpu, "losses": [float(loss) for loss in self._losses]})
        else:
            self._answer({"ready": True})
        self._losses.clear()
        self._taken += 1
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def loss(self, loss: Any) -> None:
        """A number, or a tensor that nobody has waited for."""
        self._losses.append(loss)

    def _answer(self, value: dict) -> None:
        self._answers.write(json.dumps(value) + "\n")
        self._answers.flush()


# -- a plain loop, as one writes it ----------------------------------------------------------------------------------


def plain_model(task: Task) -> Any:
    """GPT-2's architecture in torch alone, its parameters named as ours."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            h = task.hidden
            self.input_norm, self.post_attention_norm = nn.LayerNorm(h), nn.LayerNorm(h)
            self.attention = nn.ModuleDict({"query_key_value": nn.Linear(h, 3 * h), "dense": nn.Linear(h, h)})
            self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(h, 4 * h), "dense_4h_to_h": nn.Linear(4 * h, h)})

        def forward(self, x):
            b, s, h = x.shape
            q, k, v = self.attention["query_key_value"](self.input_norm(x)).split(h, dim=2)
            q, k, v = (part.view(b, s, task.heads, -1).transpose(1, 2) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, h)
            x = x + self.attention["dense"](y)
            y = F.gelu(self.mlp["dense_h_to_4h"](self.post_attention_norm(x)), approximate="tanh")
            return x + self.mlp["dense_4h_to_h"](y)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            words = nn.Embedding(task.vocabulary, task.hidden)
            positions = nn.Embedding(task.sequence, task.hidden)
            self.embedding = nn.ModuleDict({"word_embeddings": words, "position_embeddings": positions})
            self.layers = nn.ModuleList(Block() for _ in range(task.layers))
            self.final_norm = nn.LayerNorm(task.hidden)

        def forward(self, tokens, labels):
            words = self.embedding["word_embeddings"]
            x = words(tokens) + self.embedding["position_embeddings"].weight[: tokens.shape[1]]
            for layer in self.layers:
                x = layer(x)
            logits = F.linear(self.final_norm(x), words.weight)
            return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    model = Plain()
    model.load_state_dict(torch.load(Path(task.scratch) / "weights.pt", weights_only=True))
    return model


def plain(task: Task, turns: Turns) -> None:
    _plain_loop(task, turns, plain_model(task), num_ranks=1)


def fsdp(task: Task, turns: Turns) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _join(task)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model = plain_model(task)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    _plain_loop(task, turns, fully_shard(model, mesh=mesh), num_ranks=2)


def _plain_loop(task: Task, turns: Turns, model: Any, num_ranks: int) -> None:
    import torch

    if task.precision == "bf16":
        model = model.bfloat16()
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model.train()
    for tokens, labels in batches(task):
        turns.before_step()
        own = slice(task.rank * task.batch // num_ranks, (task.rank + 1) * task.batch // num_ranks)
        loss = model(tokens[own], labels[own])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if num_ranks > 1:
            torch.distributed.all_reduce(loss)
        turns.loss(loss.item() / num_ranks)


def batches(task: Task) -> Iterator[tuple[Any, Any]]:
    """(tokens, labels), each [batch, sequence] int64: those that ours reads from its data set, in that order."""
    import torch

    for batch in torch.load(Path(task.scratch) / "batches.pt", weights_only=True):
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    yield batch[:, :-1], batch[:, 1:]  # one more, before which the last turn is told


# -- Hugging Face ----------------------------------------------------------------------------------------------------


def trainer(task: Task, turns: Turns) -> None:
    import torch
    from model.huggingface_names import canonical
    from torch.utils.data import IterableDataset
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=task.vocabulary,
            n_positions=task.sequence,
            n_embd=task.hidden,
            n_layer=task.layers,
            n_head=task.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    weights = torch.load(Path(task.scratch) / "weights.pt", weights_only=True)
    with torch.no_grad():
        for name, param in model.named_parameters():
            place = canonical("gpt2", name)
            ours = weights[place.name]
            param.copy_(ours.T if place.form == "transposed" and ours.dim() == 2 else ours)

    class Samples(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for tokens, labels in batches(task):
                for sample, label in zip(tokens, labels, strict=True):
                    yield {"input_ids": sample, "labels": label, "shift_labels": label}

    class TurnsOfTrainer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.before_step()

    class Kept(Trainer):
        def compute_loss(self, *given: Any, **named: Any) -> Any:
            loss = super().compute_loss(*given, **named)
            turns.loss(loss.detach())
            return loss

    arguments = TrainingArguments(
        output_dir=str(Path(task.scratch) / "trainer"),
        per_device_train_batch_size=task.batch,
        max_steps=task.steps + 1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        bf16=task.precision == "bf16",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    Kept(model=model, args=arguments, train_dataset=Samples(), callbacks=[TurnsOfTrainer()]).train()


# -- ours ------------------------------------------------------------------------------------------------------------


def ours(task: Task, turns: Turns) -> None:
    """pretrain_gpt.py's own parts: its flags, its data, its loop."""
    from megatron.training.loop import fit

    run = build_ours(task)

    class Losses:
        def step(self, metrics: Any) -> None:
            turns.loss(metrics.loss)

        def times(self, iteration: int, seconds: Any) -> None:
            pass

    run.run_log = Losses()
    fit(run, begins=lambda iteration: turns.before_step())


def build_ours(task: Task) -> Any:
    from megatron.config.arguments import parse
    from megatron.training.launch import LaunchInfo, init_distributed

    candidate = CANDIDATES[task.candidate]
    if candidate.ranks > 1:
        _join(task)
    launch = LaunchInfo.from_environment()
    config = parse(_flags(task, candidate)).config.validate(launch.world_size)
    init_distributed(launch, "gloo")
    from megatron.training.build import build_run

    return build_run(config, launch)


def _flags(task: Task, candidate: Candidate) -> list[str]:
    is_cut_by_batch = not any("model-parallel" in flag for flag in candidate.flags)
    num_replicas = candidate.ranks if is_cut_by_batch else 1
    values = {
        "num-layers": task.layers,
        "hidden-size": task.hidden,
        "num-attention-heads": task.heads,
        "seq-length": task.sequence,
        "max-position-embeddings": task.sequence,
        "vocab-size": task.vocabulary - 1,
        "tokenizer-type": "NullTokenizer",
        "data-path": f"{task.scratch}/text",
        "split": "100,0,0",
        "num-workers": 0,
        "micro-batch-size": task.batch // num_replicas // candidate.micro_batches,
        "global-batch-size": task.batch,
        "train-iters": task.steps + 1,
        "lr": LR,
        "lr-decay-style": "constant",
        "weight-decay": WEIGHT_DECAY,
        "clip-grad": CLIP,
        "adam-beta2": 0.999,
        "hidden-dropout": 0.0,
        "attention-dropout": 0.0,
        "eval-iters": 0,
        "log-interval": 10**6,
    }
    line = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*line, *candidate.flags, *(["--bf16"] if task.precision == "bf16" else [])]


def prepare(task: Task, turns: Turns) -> None:
    """weights.pt and batches.pt: what ours would start from and read, for the others."""
    import torch

    run = build_ours(task)
    weights = {name: param.detach().clone() for name, param in run.live.engine.module.named_parameters()}
    torch.save(weights, Path(task.scratch) / "weights.pt")
    samples = run.batches.train(0)
    texts = []
    for _ in range(task.steps):
        batch = next(samples)
        texts.append(torch.cat([batch["tokens"], batch["labels"][:, -1:]], dim=1))
    torch.save(texts, Path(task.scratch) / "batches.pt")


def _join(task: Task) -> None:
    os.environ |= {
        "RANK": str(task.rank),
        "LOCAL_RANK": str(task.rank),
        "WORLD_SIZE": str(CANDIDATES[task.candidate].ranks),
        "LOCAL_WORLD_SIZE": str(CANDIDATES[task.candidate].ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(task.port),
    }


KINDS: dict[str, Callable[[Task, Turns], None]] = {"plain": plain, "fsdp": fsdp, "trainer": trainer, "ours": ours}

if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    asked = Task(**json.loads(sys.argv[1]))
    body = prepare if sys.argv[2:] == ["prepare"] else KINDS[CANDIDATES[asked.candidate].kind]
    body(asked, Turns(asked.in_a_turn))
