"""Stock ZeRO-0 saves without ucp.json: which state is which parameter's. The truth is the live optimizer's state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from harness.ranks import run_ranks
from megatron.ucp.convert import convert
from megatron.ucp.errors import CorruptFileError, SourceError, UnsupportedCheckpointError
from megatron.ucp.safe_load import load
from megatron.ucp.sources import open_source
from megatron.ucp.sources.foreign.zero0 import NAMES_KEY, _ways
from megatron.ucp.verify import verify

WIDTH = 6


class Net(nn.Module):
    """A tied output, a frozen layer, a buffer, and four square matrices that only their order tells apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH + 1)
        self.back = nn.Linear(WIDTH + 1, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))
        self.out = nn.Linear(WIDTH, 11, bias=False)
        self.out.weight = self.words.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        x = self.back(torch.tanh(self.frozen(self.words(ids)))) * self.scale
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


def _groups(net: Net, kind: str) -> list[dict]:
    trained = [p for p in net.parameters() if p.requires_grad]
    if kind == "one":
        return [{"params": trained}]
    if kind == "by-dimension":
        return [{"params": [p for p in trained if p.dim() > 1]}, {"params": [p for p in trained if p.dim() == 1]}]
    last = [*net.layers[2:].parameters()]
    return [{"params": last, "lr": 0.1}, {"params": [p for p in trained if all(p is not q for q in last)]}]


def _save(rank: int, world_size: int, folder: str, kind: str, optimizer_name: str, client_state: dict | None):
    """(state of every trained parameter by name, its step)"""
    import deepspeed

    net = Net()
    optimizer = getattr(torch.optim, optimizer_name)(_groups(net, kind), lr=0.05)
    config = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    for step in range(3):
        ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(10 * step + rank))
        engine.backward(engine(ids).square().mean())
        engine.step()
    names = {param: name for name, param in net.named_parameters()}
    state = {
        names[param]: {"fp32": param.detach().clone()} | {key: value.clone() for key, value in values.items()}
        for param, values in engine.optimizer.state.items()
    }
    if client_state is not None:
        ordered = [names[param] for group in engine.optimizer.param_groups for param in group["params"]]
        client_state = {NAMES_KEY: client_state.get(NAMES_KEY, ordered)}
    engine.save_checkpoint(folder, tag="step3", client_state=client_state or {})
    return state


def _saved(folder: Path, kind: str, optimizer: str = "Adam", client_state: dict | None = None) -> dict:
    return run_ranks(2, _save, str(folder), kind, optimizer, client_state)[0]


def _compare(folder: Path, truth: dict) -> None:
    converted = convert(folder / "step3", folder / "u", num_workers=1).manifest
    assert "in the order of the model" in converted.unverified
    assert verify(folder / "u").is_sound
    frozen = {name for name, info in converted.parameters.items() if not info.is_trainable}
    assert frozen == {"frozen.weight", "frozen.bias"}
    assert set(converted.parameters) - frozen == set(truth) and "out.weight" not in truth
    for name, states in truth.items():
        for state, tensor in states.items():
            found = load(folder / f"u/zero/{name}/{state}.pt")
            assert torch.equal(found if state == "step" else found["param"], tensor), (name, state)


@pytest.mark.parametrize("kind", ["one", "by-dimension"])
@pytest.mark.parametrize("optimizer", ["Adam", "Adagrad", "RMSprop"])
def test_every_state_is_that_of_its_parameter(kind, optimizer, tmp_path):
    _compare(tmp_path, _saved(tmp_path, kind, optimizer))


def test_groups_that_the_shapes_leave_open_are_refused(tmp_path):
    _saved(tmp_path, "last-layers")
    with pytest.raises(UnsupportedCheckpointError, match="leave open which parameter is which") as caught:
        open_source(tmp_path / "step3")
    assert NAMES_KEY in str(caught.value)


def test_the_advice_works(tmp_path):
    """Saved again with the names, as the refusal says."""
    _compare(tmp_path, _saved(tmp_path, "last-layers", client_state={}))


WRONG = {
    "another-name": (lambda names: [*names[:-1], "nobody"], "not those of its weights"),
    "twice": (lambda names: [*names[:-1], names[0]], "not those of its weights"),
    "too-few": (lambda names: names[:-1], "not those of its weights"),
    "another-shape": (lambda names: list(reversed(names)), "not the shape of the weights they are named for"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_names_that_cannot_be_are_refused(kind, tmp_path):
    change, told = WRONG[kind]
    names = [name for name, param in Net().named_parameters() if param.requires_grad]
    _saved(tmp_path, "one", client_state={NAMES_KEY: change(names)})
    with pytest.raises(SourceError, match=told):
        open_source(tmp_path / "step3")


BROKEN = {
    "a-state-of-another-shape": (
        lambda c: c["optimizer"]["state"][1].update(exp_avg=torch.zeros(3, 3), exp_avg_sq=torch.zeros(3, 3)),
        "have not the shapes of the weights",
    ),
    "numbers-with-a-hole": (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(1), "from 0 on"),
    "a-state-too-many": (lambda c: c["optimizer"]["state"].update({99: {}}), "from 0 on"),
    "half-precision": (lambda c: c.update(module={k: v.half() for k, v in c["module"].items()}), "only ZeRO-0 in fp32"),
    "no-optimizer": (lambda c: c.update(optimizer=None), "only ZeRO-0 in fp32"),
    "weights-not-by-name": (lambda c: c.update(module=[1]), "not kept by name"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_refused(kind, tmp_path):
    change, told = BROKEN[kind]
    _saved(tmp_path, "one")
    path = tmp_path / "step3/mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
    with pytest.raises((UnsupportedCheckpointError, SourceError, CorruptFileError), match=told):
        convert(tmp_path / "step3", tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_ways_by_hand():
    a, b, c = (2, 2), (2,), (3, 2)
    assert _ways([a, b, a], [[a, b, a]]) == [(0, 0, 0)]
    assert _ways([a, b, a, b], [[a, a], [b, b]]) == [(0, 1, 0, 1)]
    assert _ways([a, b, c], [[a, c], [b]]) == [(0, 1, 0)]
    assert _ways([a, c, b], [[b]]) == [(None, None, 0)]  # the others are frozen
    assert len(_ways([a, a], [[a], [a]])) == 2
    assert len(_ways([a, b, a], [[a]])) == 2  # which of the two is frozen?
    assert _ways([a, b], [[None, None]]) == [(0, 0)]  # an optimizer without states
    assert _ways([a, b], [[b, a]]) == []
    assert _ways([a], [[a, a]]) == []
    many = [a if i % 3 else b for i in range(600)]
    assert len(_ways(many, [[a] * 400, [b] * 200])) == 1
