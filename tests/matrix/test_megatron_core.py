"""A run of Megatron-Core's goes on here, under any topology, straight from its folder.

What plain torch does with the Source's weights, moments, steps and schedule on the same samples is the truth; that it
is what megatron-core itself does is tests/ucp/test_ucp_megatron_core.py's affair.
"""

import pytest
import torch
from ucp.plain_training import go_on
from ucp.samples import unpacked

from harness.ranks import RankFailure, run_ranks
from matrix.cells import cell
from matrix.recording import build, command_line, train, write_dataset
from megatron.ucp.sources import open_source

INTO = {
    "gpt_tp2": "tp1pp1dp1-plain-z0 tp4pp1dp1-z1 tp1pp2dp1-z0 tp1pp1dp2-z3",
    "llama_tp2_dp2_buckets": "tp1pp1dp1-plain-z0 tp2pp2dp1-z1 tp1pp1dp4-z2",
    "moe_ep2": "tp1pp1dp1-plain-z0 tp2pp1dp1-z1 tp1pp1dp4ep4-z1",
}
VOCABULARY, SEQ, BATCH = 29, 8, 4


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "small_text_document", vocab_size=VOCABULARY)


def argv(data, folder, place, **flags):
    """No flag says what the model is, or the schedule."""
    of_model = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "hidden_dropout")
    of_model += ("attention_dropout", "lr_decay_iters", "lr_warmup_iters")
    values = dict.fromkeys(of_model) | {
        "use_checkpoint_args": True, "use_checkpoint_opt_param-scheduler": True, "load": folder, "iters": 6,
        "vocab_size": VOCABULARY - 1, "seq_length": SEQ, "global_batch_size": BATCH, "clip_grad": 1.0,
        "adam_beta2": 0.95,
    }  # fmt: skip
    return command_line(data, **{**values, **place.flags, **flags})


def _batches(rank, world_size, arguments):
    run = build(arguments, rank, world_size)
    samples = [sample for sample, _ in zip(run.batches.train(12), range(3 * BATCH))]
    rows = [(torch.cat([s["tokens"] for s in samples[i : i + BATCH]]), samples[i : i + BATCH]) for i in (0, 4, 8)]
    return [(tokens, torch.cat([s["labels"] for s in held])) for tokens, held in rows]


@pytest.mark.parametrize("name", INTO)
def test_it_goes_on_under_any_topology(name, small_data, tmp_path):
    folder = unpacked(f"megatron_core/{name}", tmp_path)
    places = [cell(place) for place in INTO[name].split()]
    batches = run_ranks(1, _batches, argv(small_data, folder, places[0]))[0]
    expected = go_on(open_source(folder), batches)
    for place in places:
        save = {"save": tmp_path / place.name, "save_interval": 6}
        curves = run_ranks(place.world_size, train, argv(small_data, folder, place, **save))[0]
        assert sorted(curves.losses) == [4, 5, 6]
        found = [[curves.losses[step], curves.grad_norms[step]] for step in (4, 5, 6)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=3e-6)
        manifest = open_source(tmp_path / place.name).manifest
        assert manifest.common["consumed_train_samples"] == 6 * BATCH
        assert {info.step for info in manifest.parameters.values()} == {6.0}
    # What this program has saved comes first, once it has.
    again = argv(small_data, tmp_path / places[0].name, places[0], iters=7)
    assert sorted(run_ranks(1, train, again)[0].losses) == [7]


def test_another_model_is_refused_before_training(small_data, tmp_path):
    folder = unpacked("megatron_core/gpt_tp2", tmp_path)
    flags = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": SEQ}
    arguments = argv(small_data, folder, cell("tp1pp1dp1-z1"), use_checkpoint_args=None, **flags)
    with pytest.raises(RankFailure, match="model.hidden_size: 16 in the Source, 32 here"):
        run_ranks(1, train, arguments)
