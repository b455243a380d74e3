"""Random states of another number of ranks: each rank has one, no two the same."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.ucp_deepspeed.trainer import trainer_replacements


def _load(checkpoint, rank: int, world_size: int) -> float:
    """The next number, of all three generators together."""
    from transformers import trainer

    (ours,) = (each for each in trainer_replacements(trainer) if each.name == "_load_rng_state")
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    stand_in = SimpleNamespace(args=SimpleNamespace(process_index=rank, world_size=world_size, parallel_mode=None))
    ours.make(trainer.Trainer._load_rng_state)(stand_in, str(checkpoint))
    return _next()


def _next() -> float:
    return round(float(torch.rand(())) + 10 * random.random() + 100 * np.random.random(), 6)


@pytest.fixture
def checkpoint(tmp_path):
    """As Trainer saves them, of ranks that a seed each has set."""

    def make(world_size: int):
        folder = tmp_path / f"of{world_size}"
        folder.mkdir()
        for rank in range(world_size):
            torch.manual_seed(rank)
            random.seed(rank)
            np.random.seed(rank)
            states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
            torch.save(states, folder / (f"rng_state_{rank}.pth" if world_size > 1 else "rng_state.pth"))
        return folder

    return make


def _of_seed(seed: int) -> float:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return _next()


@pytest.mark.parametrize("saved, now", [(2, 3), (1, 3), (3, 2), (4, 1), (2, 2), (1, 1), (2, 5)])
def test_every_rank_has_a_state_of_its_own(saved: int, now: int, checkpoint):
    folder = checkpoint(saved)
    found = [_load(folder, rank, now) for rank in range(now)]
    own = [_of_seed(rank) for rank in range(min(saved, now))]
    assert found[: len(own)] == own
    assert len(set(found)) == now and _of_seed(99) not in found
    assert found == [_load(folder, rank, now) for rank in range(now)]


def test_stock_leaves_them_as_they_are(checkpoint):
    """What is mended: without it the generators of every rank go on from the script's own seed."""
    from transformers.trainer import Trainer

    folder = checkpoint(2)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    Trainer._load_rng_state(
        SimpleNamespace(args=SimpleNamespace(process_index=0, world_size=1, parallel_mode=None)), str(folder)
    )
    assert _next() == _of_seed(99)
