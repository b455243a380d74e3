"""Stock DeepSpeed's saves under AutoTP as Sources: every ZeRO stage, uneven cuts, fused parts, ranks without heads.

Two truths: what DeepSpeed's own converter makes of the same save, tensor by tensor, where it can; and the run that went
on, continued by DeepSpeed's own loader from our universal folder under other tensor and data parallelism.
"""

from __future__ import annotations

import pytest
import torch
from ucp import autotp_program
from ucp.autotp_program import FUSED, MODELS

from harness.ranks import RankFailure, run_ranks
from matrix.stock import stock_convert
from megatron.ucp.convert import convert
from megatron.ucp.errors import UnsupportedCheckpointError
from megatron.ucp.sources import open_source
from megatron.ucp.verify import verify

CASES = [
    ("Llama", 1, 2, 4), ("Llama", 3, 2, 4), ("Llama", 2, 3, 3), ("Llama tied", 2, 2, 2), ("Qwen2", 1, 2, 4),
    ("Qwen2", 2, 3, 3), ("GPTNeoX", 3, 2, 4), ("OPT", 1, 3, 3), (FUSED, 1, 2, 4), (FUSED, 2, 3, 3), (FUSED, 3, 3, 6),
]  # fmt: skip
"""(model, ZeRO stage, tp, ranks)."""
NO_HEADS = ("Qwen2", 2, 3, 3)
"""Two key/value heads on three ranks, so that one has none: DeepSpeed's converter fails with a TypeError."""
TARGETS = {2: [(1, 1, 2), (3, 2, 2)], 3: [(2, 1, 1), (1, 3, 3), (3, 2, 4)]}
"""(ZeRO stage, tp, ranks), by tp of the Source."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_read_as_deepspeed_reads_it_and_gone_on_with(case: tuple[str, int, int, int], tmp_path):
    kind, stage, tp_size, world_size = case
    losses = run_ranks(world_size, autotp_program.save, str(tmp_path), kind, stage, tp_size)[0]
    source = open_source(tmp_path / "there")
    assert source.manifest.topology.tp_size == tp_size and source.manifest.zero_stage == stage
    convert(tmp_path / "there", tmp_path / "universal")
    assert verify(tmp_path / "universal").is_sound
    if case == NO_HEADS:
        with pytest.raises(TypeError):
            stock_convert(0, 1, str(tmp_path / "there"), str(tmp_path / "stock"))
    else:
        stock_convert(0, 1, str(tmp_path / "there"), str(tmp_path / "stock"))
        names = {path.name for path in (tmp_path / "universal" / "zero").iterdir() if path.is_dir()}
        assert names == set(source.manifest.parameters)
        theirs = {path.name for path in (tmp_path / "stock" / "zero").iterdir() if path.is_dir()}
        assert names <= theirs and theirs - names <= {"lm_head.weight"}  # another name of a tied weight
        for name in names:
            for state in ("fp32", "exp_avg", "exp_avg_sq"):
                ours, stock = (
                    torch.load(tmp_path / where / "zero" / name / f"{state}.pt", weights_only=False)["param"]
                    for where in ("universal", "stock")
                )
                assert torch.equal(ours.flatten(), stock.flatten()), (name, state)
    for target in TARGETS[tp_size]:
        again = run_ranks(target[2], autotp_program.resume, str(tmp_path), kind, target[0], target[1])[0]
        assert again == pytest.approx(losses, abs=4e-6), target


@pytest.mark.parametrize("stage, world_size", [(3, 2), (1, 1)])
def test_a_program_without_autotp_resumes_with_install(stage: int, world_size: int, tmp_path):
    """Straight from the files of tensor-parallel ranks, each uneven."""
    losses = run_ranks(4, autotp_program.save, str(tmp_path), "Llama", 2, 2)[0]
    again = run_ranks(world_size, autotp_program.resume_with_install, str(tmp_path), "Llama", stage)[0]
    assert again == pytest.approx(losses, abs=4e-6)


def test_planted_fault_a_map_of_other_rows(tmp_path):
    """Two ranks' rows exchanged in the map: the tensors that come out are not DeepSpeed's, and training goes on
    otherwise."""
    losses = run_ranks(2, autotp_program.save, str(tmp_path), "Llama", 1, 2)[0]
    for path in (tmp_path / "there").glob("mp_rank_*_model_states.pt"):
        content = torch.load(path, weights_only=False)
        entry = content["universal_checkpoint_info"]["affine_map"]["params"][
            r"^model\.layers\.0\.mlp\.up_proj\.weight$"
        ]
        first, second = (entry["ranks"][rank]["pieces"][0] for rank in range(2))
        first["source"], second["source"] = second["source"], first["source"]
        torch.save(content, path)
    convert(tmp_path / "there", tmp_path / "universal")
    again = run_ranks(2, autotp_program.resume, str(tmp_path), "Llama", 1, 1)[0]
    assert again != pytest.approx(losses, abs=4e-6)


def test_what_deepspeed_cannot_describe_is_refused_with_its_reason(tmp_path):
    run_ranks(2, autotp_program.save, str(tmp_path), "Llama", 1, 2)
    pattern = r"^model\.layers\.0\.mlp\.up_proj\.weight$"
    for path in (tmp_path / "there").glob("mp_rank_*_model_states.pt"):
        content = torch.load(path, weights_only=False)
        info = content["universal_checkpoint_info"]
        del info["affine_map"]["params"][pattern]
        info["autotp_unsupported_parameter_patterns"] = {pattern: "a fused layout of its own"}
        torch.save(content, path)
    with pytest.raises(UnsupportedCheckpointError, match=r"up_proj\.weight: a fused layout of its own"):
        open_source(tmp_path / "there", column_parallel=(".*",))


def test_the_models_are_cut_as_the_cases_say():
    assert set(MODELS) | {FUSED} == {kind for kind, *_ in CASES}


def test_planted_fault_deepspeed_refuses_another_stage_of_its_own(tmp_path):
    """What its converter makes of ZeRO-1 it does not load under ZeRO-3: why the resumes above are of our folders."""
    run_ranks(2, autotp_program.save, str(tmp_path), "Llama", 1, 2)
    stock_convert(0, 1, str(tmp_path / "there"), str(tmp_path / "stock" / "universal"))
    with pytest.raises(RankFailure, match="AssertionError"):
        run_ranks(2, autotp_program.resume, str(tmp_path / "stock"), "Llama", 3, 2)
