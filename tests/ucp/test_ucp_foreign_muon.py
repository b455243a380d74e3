"""Saves of stock DeepSpeed with its own Muon: the momentum covers whole parameters, not the partition.

The truth is the same training on one data-parallel rank (ZeRO-1), whose tensors nothing cuts, and ZeRO-3.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from megatron.ucp.convert import convert
from megatron.ucp.errors import CorruptFileError, UnsupportedCheckpointError
from megatron.ucp.manifest import read_manifest, write_manifest
from megatron.ucp.safe_load import load
from megatron.ucp.sources import open_source
from megatron.ucp.torch_file import save_streamed
from tests.harness.ranks import run_ranks
from tests.ucp.synthetic import Topology, make_state, model, write_native

STEPS, BATCH, WIDTH = 3, 4, 24


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, n) for n in (WIDTH, 2 * WIDTH))
        self.back = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(torch.tanh(self.back(x)))


def _train(rank: int, world_size: int, folder: str, zero: dict):
    torch._dynamo.config.disable = True  # importing DeepSpeed's Muon compiles its kernels, for minutes on a CPU
    import deepspeed
    from deepspeed.runtime.zero.muon import original_muon

    # Its own fallback where FusedAdam cannot be had, which would be compiled here first, for minutes.
    vars(deepspeed.ops.adam).pop("FusedAdam", None)
    # On CPUs that have bf16 it orthogonalizes in bf16: then gradients that were summed over two ranks, and so rounded
    # otherwise than one rank's, move weights by 1e-3.
    original_muon.ns_compute_dtype = lambda *args: torch.float32
    net = Net()
    for p in net.parameters():
        p.use_muon = p.dim() > 1
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world_size,
        "zero_optimization": zero,
        "optimizer": {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.9, "ns_method": "standard"}},
    }
    engine, *_ = deepspeed.initialize(model=net, model_parameters=list(net.parameters()), config=config)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(BATCH, WIDTH, generator=generator).chunk(world_size)[rank]
        engine.backward(engine(x).square().mean())
        engine.step()
    engine.save_checkpoint(folder, tag="global_step3")


def _converted(folder, output) -> dict[tuple[str, str], torch.Tensor]:
    parameters = convert(folder, output).manifest.parameters
    return {
        (name, state): load(output / "zero" / name / f"{state}.pt")["param"]
        for name, info in parameters.items()
        for state in info.states
    }


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dp1")
    run_ranks(1, _train, str(folder), {"stage": 1})
    return _converted(folder / "global_step3", folder / "u")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_of_two_ranks_is_that_of_one(stage, truth, tmp_path):
    run_ranks(2, _train, str(tmp_path), {"stage": stage, "reduce_scatter": False})
    found = _converted(tmp_path / "global_step3", tmp_path / "u")
    assert set(found) == set(truth) and sum(state == "momentum_buffer" for _, state in found) == 4
    worst = max(float((found[key] - truth[key]).abs().max()) for key in truth)
    assert worst < 7e-7
    assert max(float(t.abs().max()) for (_, state), t in truth.items() if state == "momentum_buffer") > 1e-3


# -- a state that is as long as neither ----------------------------------------------------------------------------


@pytest.mark.parametrize("with_manifest", [False, True], ids=["foreign", "ours"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_state_of_another_size_is_never_cut(zero_stage, with_manifest, tmp_path):
    """The planted fault: zeros after the state of the first group. The offsets would fit, and lead to other elements
    if the surplus were at the front."""
    topology = Topology(dp_size=2)
    write_native(tmp_path / "n", make_state(model()), topology, zero_stage, with_manifest=with_manifest)
    for rank in range(2):
        path = tmp_path / f"n/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        content = load(path, mmap=False)
        optimizer = content["optimizer_state_dict"]
        base = optimizer["optimizer_state_dict" if zero_stage == 3 else "base_optimizer_state"]["state"]
        base[0]["exp_avg"] = torch.cat([base[0]["exp_avg"], torch.zeros(11)])
        save_streamed(content, path)
    if with_manifest:
        # Without digests and checksums, so that the size alone can show it.
        manifest = replace(read_manifest(tmp_path / "n"), digests={}, files={}, unverified="a test")
        write_manifest(tmp_path / "n", manifest)
    with pytest.raises((UnsupportedCheckpointError, CorruptFileError), match="exp_avg|another size"):
        convert(tmp_path / "n", tmp_path / "u")
    assert not (tmp_path / "u").exists()


# -- no states at all ----------------------------------------------------------------------------------------------


def _train_sgd(rank: int, world_size: int, folder: str, zero: dict):
    import deepspeed

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        engine.backward(engine(torch.randn(BATCH, WIDTH, generator=generator).chunk(world_size)[rank]).square().mean())
        engine.step()
    engine.save_checkpoint(folder, tag="global_step3")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_without_states(stage, tmp_path):
    run_ranks(2, _train_sgd, str(tmp_path), {"stage": stage})
    found = _converted(tmp_path / "global_step3", tmp_path / "u")
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(torch.randn(BATCH, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()
    assert set(found) == {(name, "fp32") for name, _ in net.named_parameters()}
    assert max(float((found[name, "fp32"] - p.detach()).abs().max()) for name, p in net.named_parameters()) < 1e-6
    assert open_source(tmp_path / "global_step3").manifest.parameters["out.weight"].step is None
