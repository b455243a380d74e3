"""Where stock DeepSpeed 0.19.8 exits 0 and trains wrongly: each case through our path, right, and beside it through the
stock one, wrong, so that a test here cannot pass for want of anything to find.

The cases: gradients under Ulysses, ZeRO-3 under Ulysses, activations between stages under --sequence-parallel, clipping
under ZeRO-0 with stages, the extra step of ZeRO-0 in low precision, a padded vocabulary under ZeRO-3, weights without
moments from a universal folder, dropout after a resume, stale copies of a tied weight, experts under another expert
parallelism. Two parameter groups under
ZeRO-3: tests/engine/test_optimizers.py; parameters that no pattern names: tests/ucp/test_ucp_deepspeed_compat.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ucp.stock_moe import LOCAL, TAG, Moe, load_universal, train_and_save

from harness.pt_files import save_again
from harness.ranks import run_ranks
from matrix.cells import Cell
from matrix.families import MODELS
from matrix.recording import Curves, build, command_line, curves, train
from matrix.stock import stock_convert
from matrix.taking import fill_with_noise
from megatron.ucp.convert import convert
from megatron.ucp.errors import ReplicaMismatchError

NUM_STEPS = 4


@pytest.fixture(scope="module")
def truth(data) -> Curves:
    """One plain process."""
    return _train(Cell(how="plain"), data)


def _train(cell: Cell, data: Path, wiring: str | None = None, **flags) -> Curves:
    argv = command_line(data, **cell.flags, **{"iters": NUM_STEPS, **flags})
    return run_ranks(cell.world_size, _wired, argv, wiring)[0]


def _wired(rank: int, world_size: int, argv: list[str], wiring: str | None) -> Curves:
    """Train with our path, or with one piece of it taken out."""
    from megatron.training.loop import fit

    if wiring is not None:
        WIRINGS[wiring]()
    run = build(argv, rank, world_size)
    fit(run)
    return curves(run, None)


def _tell_deepspeed_of_sequences() -> None:
    """As DeepSpeed's own examples: an mpu with sequence groups, and a batch that does not count them."""
    from megatron.parallel.mpu import Mpu
    from megatron.training import build as module

    class SequenceMpu(Mpu):
        def __init__(self, context):
            super().__init__(context)
            self.get_sequence_parallel_group = lambda: context.sp_group
            self.get_sequence_parallel_world_size = lambda: context.sp_size
            self.get_sequence_parallel_rank = lambda: context.sp_rank
            self.get_sequence_data_parallel_group = lambda: context.zero_group
            self.get_sequence_data_parallel_world_size = lambda: context.zero_size
            self.get_sequence_data_parallel_rank = lambda: context.zero_rank
            self.get_data_parallel_group = lambda: self._alone
            self.get_data_parallel_world_size = lambda: 1
            self.get_data_parallel_rank = lambda: 0
            self.get_data_parallel_group_ranks = lambda: [context.rank]

    made = module.deepspeed_config

    def uncounted(config, topology, user_json=None):
        ds_config, notes = made(config, topology, user_json)
        ds_config["train_batch_size"] //= topology.sp_size
        return ds_config, notes

    module.Mpu, module.deepspeed_config = SequenceMpu, uncounted


def _tell_deepspeed_of_sequences_after_construction() -> None:
    from contextlib import nullcontext

    from megatron.training import build as module

    _tell_deepspeed_of_sequences()
    module.partitioned_construction = lambda ds_config, mpu: nullcontext()


def _send_shares_of_activations() -> None:
    from megatron.training import build as module

    made = module.deepspeed_config

    def default(config, topology, user_json=None):
        ds_config, notes = made(config, topology, user_json)
        del ds_config["pipeline"]
        return ds_config, notes

    module.deepspeed_config = default


def _clip_by_stock() -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from megatron.engine import engine as module

    class Stock(PipelineEngine):
        pass

    module.PipeEngine = Stock


WIRINGS = {
    "sequence groups": _tell_deepspeed_of_sequences,
    "sequence groups, no zero.Init": _tell_deepspeed_of_sequences_after_construction,
    "shares of activations": _send_shares_of_activations,
    "stock clipping": _clip_by_stock,
}


def _delta(found: Curves, truth: Curves) -> float:
    return max(abs(found.losses[step] - loss) for step, loss in truth.losses.items())


def _norm_ratios(found: Curves, truth: Curves) -> list[float]:
    return [found.grad_norms[step] / norm for step, norm in truth.grad_norms.items()]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_gradients_under_ulysses_are_averaged_not_summed(zero: int, data, truth):
    cell = Cell(sp=2, zero=zero, how="plain" if zero < 2 else "")
    ours = _train(cell, data)
    assert _delta(ours, truth) < 2e-6
    assert _norm_ratios(ours, truth) == pytest.approx([1.0] * NUM_STEPS, rel=1e-5)
    stock = _train(cell, data, "sequence groups")
    assert _norm_ratios(stock, truth)[0] > 1.9


def test_ulysses_under_zero3_trains_one_model(data, truth):
    ours = _train(Cell(sp=2, zero=3), data)
    assert _delta(ours, truth) < 2e-6
    assert _norm_ratios(ours, truth) == pytest.approx([1.0] * NUM_STEPS, rel=1e-5)
    stock = _train(Cell(sp=2, zero=3), data, "sequence groups, no zero.Init")
    assert _delta(stock, truth) > 1e-3


def test_stages_send_whole_activations_where_tp_ranks_have_other_parts_of_the_sequence(data, truth):
    cell = Cell(tp=2, pp=2, zero=1, cut=True)
    assert _delta(_train(cell, data), truth) < 2e-6
    assert _delta(_train(cell, data, "shares of activations"), truth) > 1e-3


@pytest.mark.parametrize("cell", [Cell(pp=2), Cell(tp=2, pp=2), Cell(pp=2, dp=2)], ids=lambda cell: cell.name)
def test_clipping_under_zero0_with_stages(cell: Cell, data):
    flags = {"clip_grad": 0.05}
    truth = _train(Cell(how="plain"), data, **flags)
    ours = _train(cell, data, **flags)
    assert _delta(ours, truth) < 2e-6
    assert _norm_ratios(ours, truth) == pytest.approx([1.0] * NUM_STEPS, rel=1e-5)
    assert _delta(_train(cell, data, "stock clipping", **flags), truth) > 1e-4


def _low_precision_start(rank: int, world_size: int, argv: list[str]):
    run = build(argv, rank, world_size)
    run.live.state.make_states()
    return {run.live.state.step_of(interval.flat) for interval in run.live.state.intervals}


def _stock_low_precision_start(rank: int, world_size: int):
    import deepspeed

    model = torch.nn.Linear(4, 4)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}},
    )
    return {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}


def test_zero0_in_bf16_takes_no_step_at_construction(data):
    argv = command_line(data, zero=0, bf16=True)
    assert run_ranks(1, _low_precision_start, argv) == [{0.0}]
    assert run_ranks(1, _stock_low_precision_start) == [{1.0}]
    zero0, zero1 = (_train(Cell(zero=zero), data, bf16=True) for zero in (0, 1))
    assert zero0.losses == zero1.losses


@pytest.fixture(scope="module")
def source(tmp_path_factory, data) -> Path:
    """tp2 pads the vocabulary of 101 to 112 and one rank to 104; saved after two of four steps."""
    folder = tmp_path_factory.mktemp("source")
    argv = command_line(data, tp=2, zero=1, iters=NUM_STEPS, exit_interval=2, save=folder)
    run_ranks(2, train, argv)
    convert(folder / "global_step2", folder / "global_step2_universal", num_workers=1)
    return folder


def _stock_resume(rank: int, world_size: int, argv: list[str], folder: str, with_optimizer: bool):
    """DeepSpeed's own loader, then one step: (loss, whether moments are those of the Source or zero)."""
    from megatron.engine.steps import train_step

    run = build(argv, rank, world_size)
    fill_with_noise(run)
    run.live.engine.load_checkpoint(folder, load_optimizer_states=with_optimizer)
    state = run.live.state
    has_moments = any(bool(interval.state(state.base, "exp_avg").any()) for interval in state.intervals)
    return train_step(run.live.engine, run.batches.train(16)), has_moments


def _our_resume(rank: int, world_size: int, argv: list[str]):
    from megatron.engine.steps import train_step

    run = build(argv, rank, world_size)
    state = run.live.state
    state.make_states()
    has_moments = any(bool(interval.state(state.base, "exp_avg").any()) for interval in state.intervals)
    return train_step(run.live.engine, run.batches.train(run.progress.consumed_train_samples)), has_moments


@pytest.fixture
def stock_json(tmp_path) -> Path:
    path = tmp_path / "ds.json"
    path.write_text('{"checkpoint": {"load_universal": true}}')
    return path


def test_a_vocabulary_padded_otherwise_under_zero3(data, truth, stock_json, tmp_path):
    """Saved with 104 rows, resumed with 112. Stock reads its own universal folder of the very same save: with 104 rows
    rightly, with 112 every parameter after the vocabulary shifted."""
    cell = Cell(dp=2, zero=3)
    run_ranks(2, train, command_line(data, **cell.flags, iters=NUM_STEPS, exit_interval=2, save=tmp_path))
    more = {**cell.flags, "make_vocab_size_divisible_by": 16}
    for loss, has_moments in run_ranks(2, _our_resume, command_line(data, **more, load=tmp_path)):
        assert has_moments and abs(loss - truth.losses[3]) < 2e-6
    run_ranks(1, stock_convert, str(tmp_path / "global_step2"), str(tmp_path / "global_step2_universal"))
    (tmp_path / "latest_universal").write_text("global_step2_universal")
    for flags, is_right in ((cell.flags, True), (more, False)):
        argv = command_line(data, **flags, deepspeed_config=stock_json)
        for loss, _ in run_ranks(2, _stock_resume, argv, str(tmp_path), True):
            assert (abs(loss - truth.losses[3]) < 2e-6) == is_right


def test_weights_without_moments_from_a_universal_folder(data, source, truth, stock_json):
    cell = Cell(zero=1)
    argv = command_line(data, **cell.flags, load=source, universal_checkpoint=True, no_load_optim=True)
    [(loss, has_moments)] = run_ranks(1, _our_resume, argv)
    assert not has_moments and abs(loss - truth.losses[3]) < 2e-6
    argv = command_line(data, **cell.flags, deepspeed_config=stock_json)
    [(_, has_moments)] = run_ranks(1, _stock_resume, argv, str(source), False)
    assert has_moments, "stock takes the moments although it was told not to"


def test_dropout_goes_on_where_it_was(data, tmp_path):
    flags = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    cell = Cell(dp=2, zero=1)
    whole = _train(cell, data, **flags)
    _train(cell, data, exit_interval=2, save=tmp_path, **flags)
    assert _train(cell, data, load=tmp_path, **flags).losses == {step: whole.losses[step] for step in (3, 4)}
    stock = _train(cell, data, load=tmp_path, no_load_rng=True, **flags)  # stock saves no random state
    assert stock.losses[3] != whole.losses[3]


def test_a_stale_copy_of_a_tied_weight_is_refused(data, tmp_path):
    """The last stage's copy drifts; stock's converter takes one of the two without a word."""
    run_ranks(2, train, command_line(data, pp=2, zero=1, iters=2, save=tmp_path))
    path = tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    content = torch.load(path, weights_only=False)
    optimizer = content["optimizer_state_dict"]
    tied = "embedding.word_embeddings.weight"
    [(group, mapping)] = [(g, m) for g, m in enumerate(optimizer["param_slice_mappings"]) if tied in m]
    optimizer["single_partition_of_fp32_groups"][group].data[mapping[tied].start + 5] += 1.0
    save_again(content, path)
    run_ranks(1, stock_convert, str(tmp_path / "global_step2"), str(tmp_path / "stock"))
    with pytest.raises(ReplicaMismatchError, match=tied):
        convert(tmp_path / "global_step2", tmp_path / "universal", num_workers=1)


def test_experts_under_another_expert_parallelism(data, tmp_path):
    """From ep 1 to ep 2. Stock looks experts up by their numbers within a rank: the second rank's are the first's."""
    flags = {**MODELS["moe"], "iters": NUM_STEPS}
    whole = _train(Cell(dp=2, zero=1), data, **flags)
    _train(Cell(dp=2, zero=1), data, exit_interval=2, save=tmp_path / "ours", **flags)
    resumed = _train(Cell(dp=2, ep=2, zero=1), data, load=tmp_path / "ours", **flags)
    assert sorted(resumed.losses) == [3, 4]
    assert max(abs(resumed.losses[step] - whole.losses[step]) for step in (3, 4)) < 2e-6

    saved = run_ranks(2, train_and_save, str(tmp_path / "stock"), Moe(2, {"stage": 1}, ep=(1, 1)))[0][1]
    run_ranks(1, stock_convert, str(tmp_path / "stock" / TAG), str(tmp_path / "stock" / f"{TAG}_universal"))
    (tmp_path / "stock" / "latest_universal").write_text(f"{TAG}_universal")
    held = run_ranks(2, load_universal, str(tmp_path / "stock" / f"{TAG}_universal"), Moe(2, {"stage": 1}))
    for name in (f"1.moe{LOCAL}{{}}.up.weight", f"1.moe{LOCAL}{{}}.down.weight"):
        first, third = (saved[name.format(expert)]["fp32"] for expert in (0, 2))
        assert torch.equal(held[0][name.format(0)]["fp32"], first)
        assert torch.equal(held[1][name.format(2)]["fp32"], first) and not torch.equal(first, third)
