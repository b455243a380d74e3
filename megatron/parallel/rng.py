"""Two random streams per rank, and activation checkpointing that replays both.

What is replicated over tp (the residual stream) must draw the same numbers on every tp rank, what is
cut over tp (a rank's attention heads; the residual stream under sequence parallelism) must not. So the device's own
generator is the default stream, equal on tp ranks, and a second one is swapped in by `fork`.

    streams = RandomStreams(seed=1234, context)
    hidden = streams.residual_dropout(hidden, 0.1)
    with streams.fork(): weights = dropout(weights)
    output = streams.checkpointed(block, hidden)  # recomputed in backward with the same numbers

For bit-equal resume: `state_dict()` / `load_state_dict()`, uint8 tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.parallel.context import ParallelContext


class RandomStreams:
    """Seeds the device's generator at construction. Local: no communication."""

    def __init__(self, seed: int, context: ParallelContext) -> None:
        self._seed, self._context = seed, context
        self.reseed(iteration=0)

    def reseed(self, iteration: int) -> None:
        """Start both streams anew. After a change of topology there is no state to go on from, so the rule is: the
        streams are a function of (seed, iteration, pp_rank, zero_rank), the tensor-parallel one of tp_rank too."""
        context = self._context
        place = (iteration, context.pp_rank, context.zero_rank)
        torch.manual_seed(derived_seed(self._seed, "host", *place))
        self._seed_device(derived_seed(self._seed, "tensor_parallel", *place, context.tp_rank))
        self._tensor_parallel = _device_state()
        self._seed_device(derived_seed(self._seed, "default", *place))

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Draw from the tensor-parallel stream inside the block."""
        default = _device_state()
        _set_device_state(self._tensor_parallel)
        try:
            yield
        finally:
            self._tensor_parallel = _device_state()
            _set_device_state(default)

    def residual_dropout(self, x_bsh: Tensor, probability: float) -> Tensor:
        """Dropout between the matrices of a block."""
        if probability == 0.0:
            return x_bsh
        with self.fork() if self._context.is_sequence_parallel else nullcontext():
            return F.dropout(x_bsh, probability)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Leave both streams as they were (an evaluation must not change training)."""
        saved = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(saved)

    def checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` without keeping its activations; backward runs it again with the same draws."""
        if not torch.is_grad_enabled():
            return function(*args)
        before = self._states()
        # torch's own handling covers only the default stream, so it is off and both are replayed here.
        return checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self._replay(before)),
        )

    def state_dict(self) -> dict[str, Tensor]:
        default, tensor_parallel = self._states()
        return {"default": default, "tensor_parallel": tensor_parallel, "host": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["host"].cpu())
        self._tensor_parallel = state["tensor_parallel"].cpu()
        # After "host": on a CPU both are one generator, and then both hold the same state.
        _set_device_state(state["default"].cpu())

    @staticmethod
    def _seed_device(seed: int) -> None:
        get_accelerator().manual_seed(seed)

    def _states(self) -> tuple[Tensor, Tensor]:
        return _device_state(), self._tensor_parallel.clone()

    @contextmanager
    def _replay(self, states: tuple[Tensor, Tensor]) -> Iterator[None]:
        now = self._states()
        _set_device_state(states[0])
        self._tensor_parallel = states[1].clone()
        try:
            yield
        finally:
            _set_device_state(now[0])
            self._tensor_parallel = now[1]


def derived_seed(seed: int, *what: object) -> int:
    """A 63-bit seed for one purpose: different for every (seed, what), the same on every machine."""
    text = "/".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _device_state() -> Tensor:
    return get_accelerator().get_rng_state()


def _set_device_state(state: Tensor) -> None:
    get_accelerator().set_rng_state(state)
