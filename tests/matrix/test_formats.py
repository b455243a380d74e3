"""Every format becomes every other, bitwise, or is refused with the reason that the table in README gives.

What a Source holds is read in one piece under our names, and held against what is read of what became of it: every
state of every parameter, and the steps. A cell that says less than what arrives is wrong too.
"""

import re
from pathlib import Path

import pytest
import torch
from ucp.dcp_program import fsdp2
from ucp.huggingface_models import made
from ucp.samples import unpacked

from harness.ranks import run_ranks
from matrix.formats import (
    ALL,
    CELLS,
    NO_FILES,
    NO_MODEL,
    NO_NAMES,
    SOURCES,
    TARGETS,
    VIA,
    WEIGHTS_IN,
    WEIGHTS_OUT,
    table,
)
from matrix.recording import build, command_line, train, write_dataset
from matrix.stock import stock_convert
from megatron.ucp.convert import convert
from megatron.ucp.digest import digest_tensor
from megatron.ucp.errors import UcpError
from megatron.ucp.execute import read_into
from megatron.ucp.export import export, export_dcp
from megatron.ucp.reshape import reshape
from megatron.ucp.runs import whole_runs
from megatron.ucp.sources import find_checkpoint, open_source
from megatron.ucp.sources.renamed import with_names_of
from megatron.ucp.targets.native_target import NativeTarget

REASONS = {
    NO_FILES: "no buffers and no program's state of its own",
    NO_MODEL: "does not say of which model it is",
    NO_NAMES: "cannot be written as DeepSpeed's own",
}
ROOT = Path(__file__).resolve().parents[2]
CASES = [(source, target) for source in SOURCES for target in TARGETS]
LLAMA = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "ffn_hidden_size": 24,
    "normalization": "rmsnorm", "swiglu": True, "disable_bias_linear": True, "use_rotary_position_embeddings": True,
    "untie_embeddings_and_output_weights": True, "seq_length": 8, "max_position_embeddings": 8, "vocab_size": 28,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "small_text_document", vocab_size=29)


@pytest.fixture(scope="module")
def sources(small_data, tmp_path_factory):
    """name -> the folder."""
    folder = tmp_path_factory.mktemp("formats")
    flags = {**LLAMA, "iters": 3, "save": folder / "run", "save_interval": 3, "no_pipeline_parallel": True}
    flags["make_vocab_size_divisible_by"] = 1
    run_ranks(2, train, command_line(small_data, **{**flags, "zero": 1}))
    run_ranks(1, stock_convert, str(find_checkpoint(folder / "run")), str(folder / "stock"))
    run_ranks(2, fsdp2, folder / "dcp", "llama")
    made("llama").save_pretrained(folder / "like")
    samples = {"core": "megatron_core/llama_tp2_dp2", "mds": "megatron_deepspeed/llama_tp2_pp2_z1"}
    samples["mds of one tp and pp rank"] = "megatron_deepspeed/gpt_z1"
    found = {name: unpacked(sample, folder) for name, sample in samples.items()}
    convert(folder / "run", folder / "universal")
    export(folder / "run", folder / "hf")
    own = {name: folder / name for name in ("universal", "stock", "hf", "dcp")}
    return {"native": folder / "run", "like": folder / "like", **own, **found}


def opened(name, sources):
    """Under our names."""
    if name == "dcp":
        return with_names_of(open_source(sources["dcp"]), sources["like"])
    return open_source(sources[name], program="megatron-deepspeed" if name == "mds" else None)


def converted(name, sources, output):
    like = sources["like"] if name == "dcp" else None
    program = "megatron-deepspeed" if name == "mds" else None
    return convert(sources[name], output, like=like, program=program).output


def states_of(source):
    """(parameter, state) -> values; and of each parameter the step."""
    found = {}
    for name, info in source.manifest.parameters.items():
        found[name, "step"] = info.step
        for state in info.states:
            values = torch.zeros(info.layout.numel)
            read_into(source, name, state, whole_runs(info.layout.numel), values)
            found[name, state] = values.view(info.layout.shape)
    return found


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def weights_of(states):
    kept = {key: value for key, value in states.items() if key[1] in ("fp32", "step")}
    return {key: None if key[1] == "step" else value for key, value in kept.items()}


def _live(rank, world_size, argv):
    """What stands in the ranks after loading."""
    from megatron.checkpoint.state_digest import state_digests

    return state_digests(build(argv, rank, world_size).live.state)


def live_digests(folder, small_data, is_finetune):
    model = open_source(folder).manifest.model
    of_model = dict.fromkeys((*LLAMA, "hidden_dropout", "attention_dropout"))
    if model:
        known = {**of_model, "use_checkpoint_args": True, "seq_length": 8, "vocab_size": model["vocab_size"] - 1}
    else:  # what DeepSpeed's converter wrote
        known = LLAMA
    flags = {"load": folder, "override_opt_param_scheduler": True, "finetune": is_finetune, "iters": 20, "tp": 2}
    return run_ranks(2, _live, command_line(small_data, **{**known, **flags, "zero": 1}))[0]


def as_live(states, digests, carried):
    """Whether the ranks hold what is carried of those states; of weights alone, what the optimizer begins with is not
    looked at."""
    wanted = states if carried == ALL else weights_of(states)
    found = {(name, state): held for name, of in digests.items() for state, held in of.items()}
    tensors = {key: value for key, value in wanted.items() if isinstance(value, torch.Tensor)}
    told = {key: digest_tensor(value, name=key[0], state=key[1]).hex() for key, value in tensors.items()}
    return told == {key: held for key, held in found.items() if key in told} and len(told) >= len(digests)


def become(target, folder, sources, output):
    """The Source that `folder` has become."""
    if target == "universal":
        return open_source(convert(folder, output).output)
    if target == "reshaped":
        reshape(folder, output, NativeTarget.parse("zero2", 3))
        return open_source(output)
    if target == "hf":
        return open_source(export(folder, output, dtype="float32", max_positions=8).output)
    export(folder, output.with_name("like"), dtype="float32", max_positions=8)
    return with_names_of(open_source(export_dcp(folder, output).output), output.with_name("like"))


@pytest.mark.parametrize(("source", "target"), CASES)
def test_cell(source, target, sources, small_data, tmp_path):
    expected = CELLS[source][target]
    states, folder = states_of(opened(source, sources)), sources[source]
    if expected in REASONS:
        folder = sources["mds of one tp and pp rank"] if source == "mds" else folder
        with pytest.raises(UcpError, match=REASONS[expected]):
            become(target, folder, sources, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    if expected == VIA or (target == "universal" and source in ("dcp", "mds")):
        folder = converted(source, sources, tmp_path / "universal")
        expected = CELLS["universal"][target] if expected == VIA else expected
        if target == "universal":
            assert same(states_of(open_source(folder)), states)
            return
    carried = ALL if expected == ALL else None
    assert expected in (ALL, WEIGHTS_IN, WEIGHTS_OUT)
    if target == "live":
        is_finetune = expected == WEIGHTS_IN
        assert as_live(states, live_digests(folder, small_data, is_finetune), carried)
        return
    found = states_of(become(target, folder, sources, tmp_path / "out"))
    assert same(found, states if carried == ALL else weights_of(states))


def test_a_cell_that_says_otherwise_is_seen(sources):
    states = states_of(opened("core", sources))
    changed = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in states.items()}
    assert same(changed, states)
    key = next(key for key in changed if key[1] == "exp_avg_sq")
    changed[key].view(-1)[3] += 1e-9
    assert not same(changed, states) and same(weights_of(changed), weights_of(states))
    assert not same({k: v for k, v in states.items() if k[1] != "exp_avg"}, states)
    assert not same({**states, ("final_norm.weight", "step"): 4.0}, states)


def test_ranks_that_hold_something_else_are_seen(sources):
    states = states_of(opened("core", sources))
    tensors = {key: value for key, value in states.items() if isinstance(value, torch.Tensor)}
    digests = {}
    for (name, state), value in tensors.items():
        digests.setdefault(name, {})[state] = digest_tensor(value, name=name, state=state).hex()
    assert as_live(states, digests, ALL) and as_live(states, digests, WEIGHTS_IN)
    moments = {name: {**of, "exp_avg": of["exp_avg_sq"]} for name, of in digests.items()}
    assert not as_live(states, moments, ALL) and as_live(states, moments, WEIGHTS_IN)
    assert not as_live(states, {name: {"fp32": of["fp32"]} for name, of in digests.items()}, ALL)
    weights = {name: {**of, "fp32": of["exp_avg"]} for name, of in digests.items()}
    assert not as_live(states, weights, WEIGHTS_IN)
    assert not as_live(states, {}, WEIGHTS_IN)


def in_readme(text):
    found = re.search(r"<!-- tests/matrix/formats.py -->\n(.*?)\n<!-- -->", text, re.S)
    return found and found[1] == table()


def test_the_table_in_readme_is_this_one():
    text = (ROOT / "README.md").read_text()
    assert in_readme(text)
    assert not in_readme(text.replace("| no: its weights lie in dicts of dicts |", "| yes |"))
    assert not in_readme(text.replace("<!-- tests/matrix/formats.py -->", ""))
