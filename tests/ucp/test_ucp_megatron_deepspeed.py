"""Megatron-DeepSpeed's checkpoints, made by Megatron-DeepSpeed itself (tests/ucp/megatron_deepspeed), are read right.

Truths that are not ours: the losses and gradient norms with which it went on after it had saved, and what DeepSpeed's
own converter makes of the same folder.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from ucp.plain_training import go_on
from ucp.samples import all_of, unpacked

from megatron.ucp import cli
from megatron.ucp.convert import convert
from megatron.ucp.diff import diff
from megatron.ucp.errors import NotACheckpointError, UcpError, UnsupportedCheckpointError
from megatron.ucp.sources import find_checkpoint, open_source
from megatron.ucp.sources.megatron import deepspeed
from megatron.ucp.sources.megatron.names import deepspeed_names

FP32 = (
    "gpt_z0", "gpt_exact_gelu", "gpt_z1", "gpt_tp2_z2", "gpt_z3", "llama_z2", "llama_tp2_pp2_z1", "gpt_pp2_since_2024",
    "gpt_tp2_since_2024",
)  # fmt: skip
VOCABULARY, SEQ, BATCH, STEPS = 29, 8, 4, 3  # megatron_deepspeed/make.py
TOLERANCE = 2e-5
ENUMS = "import enum\nclass ModelType(enum.Enum):\n    encoder_or_decoder = 1\n"
PROGRAM = "megatron-deepspeed"


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """name -> its run folder."""
    return all_of("megatron_deepspeed", tmp_path_factory.mktemp("megatron_deepspeed"))


@pytest.fixture
def copied(tmp_path):
    """A sample's folder that may be damaged."""

    def copy(name):
        return unpacked(f"megatron_deepspeed/{name}", tmp_path) / "global_step3"

    return copy


def gone_on(source):
    """On megatron_deepspeed/make.py's samples."""

    def sample(index):
        generator = torch.Generator().manual_seed(1000 + index % (2 * BATCH))
        return torch.randint(0, VOCABULARY, (SEQ + 1,), generator=generator)

    steps = range(STEPS, STEPS + 3)
    rows = [torch.stack([sample(i) for i in range(step * BATCH, step * BATCH + BATCH)]) for step in steps]
    return go_on(source, [(row[:, :-1], row[:, 1:]) for row in rows])


def theirs(samples, name):
    return json.loads((samples[name] / "losses.json").read_text())["after"]


def is_as_theirs(found, expected, tolerance=TOLERANCE):
    """ZeRO-0 tells no gradient norm."""
    pairs = [(a, b) for pair in zip(found, expected, strict=True) for a, b in zip(*pair, strict=True)]
    told = [(a, b) for a, b in pairs if not math.isnan(b)]
    assert len(told) >= len(found)
    return all(math.isclose(a, b, abs_tol=tolerance) for a, b in told)


@pytest.mark.parametrize("name", FP32)
def test_training_goes_on_as_megatron_deepspeed_went_on(samples, name):
    source = open_source(samples[name], program=PROGRAM)
    common = source.manifest.common
    assert (common["iteration"], common["consumed_train_samples"]) == (STEPS, STEPS * BATCH)
    groups = source.manifest.optimizer.groups
    # Under its ZeRO-3 a partitioned parameter has one dimension, and nothing decays.
    decay = 0.0 if name == "gpt_z3" else 0.1
    assert {key: group["weight_decay"] for key, group in groups.items()} == {"decay": decay, "no_decay": 0.0}
    assert is_as_theirs(gone_on(source), theirs(samples, name))


def test_bf16_runs_bring_their_masters(samples):
    source = open_source(samples["llama_pp2_bf16"], program=PROGRAM)
    assert is_as_theirs(gone_on(source), theirs(samples, "llama_pp2_bf16"), tolerance=5e-3)
    assert {info.dtype for info in source.manifest.parameters.values()} == {"bfloat16"}


def test_padding_of_the_vocabulary_is_left_out(samples):
    """Its softmax runs over the padding too: with the same weights its loss is a little higher than ours."""
    source = open_source(samples["gpt_pp2_padded"], program=PROGRAM)
    assert source.manifest.parameters["embedding.word_embeddings.weight"].layout.shape[0] == VOCABULARY
    (loss, _), *_ = gone_on(source)
    (expected, _), *_ = theirs(samples, "gpt_pp2_padded")
    assert 0 < expected - loss < math.log(32 / 29) * 1.1


@pytest.mark.parametrize("name", ["llama_tp2_pp2_z1", "gpt_pp2_since_2024", "gpt_tp2_since_2024"])
def test_from_deepspeeds_own_converter_the_same_bitwise(samples, tmp_path, name):
    """Which converts those with a pipeline only (DeepSpeed 0.19.8)."""
    folder = find_checkpoint(samples[name])
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder)]
    command += ["--output_folder", str(tmp_path / "stock"), "--num_extract_workers", "1", "--num_merge_workers", "1"]
    program = {"megatron/__init__.py": "", "megatron/core/__init__.py": "", "megatron/core/enums.py": ENUMS}
    for path, content in program.items():  # whose classes DeepSpeed's converter imports to open the files
        (tmp_path / "program" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "program" / path).write_text(content)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "program")}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
    ours = convert(folder, tmp_path / "ours", program=PROGRAM)
    stock = convert(tmp_path / "stock", tmp_path / "from_stock", program=PROGRAM)
    assert diff(ours.output, stock.output).is_equal
    assert stock.manifest.common["schedule"] == ours.manifest.common["schedule"]


def test_the_command_line_and_what_becomes_of_it(samples, tmp_path, capsys):
    run = samples["llama_tp2_pp2_z1"]
    assert cli.main(["convert", str(run), str(tmp_path / "universal"), "--from", PROGRAM]) == 0
    assert cli.main(["verify", str(tmp_path / "universal")]) == 0
    source = open_source(tmp_path / "universal")
    assert source.manifest.model["num_key_value_heads"] == 2 and source.manifest.model["positions"] == "rope"
    assert is_as_theirs(gone_on(source), theirs(samples, "llama_tp2_pp2_z1"))
    assert cli.main(["convert", str(tmp_path / "universal"), str(tmp_path / "again"), "--from", PROGRAM]) == 2
    assert "this program saved it" in capsys.readouterr().err
    for flags in (["--to", "zero1", "--dp", "2"], ["--like", str(run)]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["convert", str(run), str(tmp_path / "never"), "--from", PROGRAM, *flags])
        assert stopped.value.code == 2


MISTAKES = {
    "the newer layout of q, k, v taken for the published one": ("gpt_tp2_since_2024", False),
    "the published layout taken for the newer one": ("gpt_tp2_z2", True),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_table_shows_in_the_losses(samples, monkeypatch, mistake):
    name, is_by_rank = MISTAKES[mistake]
    of_table = deepspeed.deepspeed_table
    monkeypatch.setattr(deepspeed, "deepspeed_table", lambda tp_size, _: of_table(tp_size, is_by_rank))
    source = open_source(samples[name], program=PROGRAM)
    assert not is_as_theirs(gone_on(source), theirs(samples, name))


def test_a_mistake_in_what_is_carried_shows_in_the_losses(samples):
    def changed(**of_all):
        source = open_source(samples["gpt_z1"], program=PROGRAM)
        for key, info in source.manifest.parameters.items():
            source.manifest.parameters[key] = dataclasses.replace(info, **of_all)
        return source

    expected = theirs(samples, "gpt_z1")
    assert not is_as_theirs(gone_on(changed(step=2.0)), expected)
    assert not is_as_theirs(gone_on(changed(group="no_decay")), expected)


PIPELINED = {
    "tied_modules.embed.word_embeddings.weight": "word_embeddings.weight",
    "3.mlp.dense_h_to_4h.bias": "layers.0.mlp.dense_h_to_4h.bias",
    "5.self_attention.dense.weight": "layers.1.self_attention.dense.weight",
    "8.bias": "final_layernorm.bias",
}
OTHERS = {
    "language_model.transformer.layers.7.input_layernorm.weight": "layers.7.input_layernorm.weight",
    "1.position_embeddings.weight": "position_embeddings.weight",
    "9.lm_head.weight": "lm_head.weight",
}


def test_names_with_and_without_a_pipeline():
    assert deepspeed_names(list(PIPELINED)) == PIPELINED
    assert deepspeed_names(list(OTHERS)) == OTHERS
    assert deepspeed_names(["model.embed_tokens.weight"]) == {}


def test_two_parameters_of_one_name_are_refused(samples, monkeypatch):
    names = deepspeed.deepspeed_names
    monkeypatch.setattr(deepspeed, "deepspeed_names", lambda there: {**names(there), **_first_only(names(there))})
    with pytest.raises(UnsupportedCheckpointError, match="not those of the model") as error:
        open_source(samples["gpt_z1"], program=PROGRAM)
    assert any("have a name that another one has" in line for line in error.value.found)


def _first_only(names):
    """Every block's names are the first one's."""
    return {there: re.sub(r"^layers\.\d+", "layers.0", name) for there, name in names.items()}


def edited(folder, change, monkeypatch):
    """Every file's content changed."""
    enums = types.ModuleType("megatron.core.enums")
    exec(ENUMS, vars(enums))
    for name, module in {"megatron.core": types.ModuleType("megatron.core"), "megatron.core.enums": enums}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for path in folder.glob("mp_rank_*_model_states.pt"):
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)


def test_another_gelu_shows_in_the_losses(copied, samples, monkeypatch):
    folder = copied("gpt_exact_gelu")
    assert open_source(folder, program=PROGRAM).manifest.model["exact_gelu"]
    edited(folder, lambda content: vars(content["args"]).update(bias_gelu_fusion=True), monkeypatch)
    assert not is_as_theirs(gone_on(open_source(folder, program=PROGRAM)), theirs(samples, "gpt_exact_gelu"))


REFUSED = {
    "experts": (lambda c: vars(c["args"]).update(num_experts=[4]), "experts"),
    "another model": (lambda c: vars(c["args"]).update(apply_layernorm_1p=True), "--apply-layernorm-1p True"),
    "another width": (lambda c: vars(c["args"]).update(ffn_hidden_size=80), "(64, 16), (80, 16) is expected"),
    "no args": (lambda c: c.pop("args"), "no args"),
    "no degree of parallelism, and rows by rank": (
        lambda c: vars(c["args"]).update(tensor_model_parallel_size="2", ds_sequence_parallel_fpdt=False),
        "tensor parallelism of",
    ),
    "GQA by a version that computed it wrong": (
        lambda c: vars(c["args"]).update(num_key_value_heads=2, ds_sequence_parallel_fpdt=False), "computed wrong",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_ours_to_read_is_refused_whole(copied, tmp_path, monkeypatch, case):
    change, told = REFUSED[case]
    folder = copied("gpt_z1")
    edited(folder, change, monkeypatch)
    with pytest.raises(UnsupportedCheckpointError, match="^") as error:
        convert(folder, tmp_path / "universal", program=PROGRAM)
    assert told in str(error.value) and not (tmp_path / "universal").exists()


def test_another_programs_folder_is_refused(samples, tmp_path):
    with pytest.raises(NotACheckpointError, match="no program that is known"):
        open_source(samples["gpt_z1"], program="nemo")
    (tmp_path / "run").mkdir()
    torch.save({"module": {}}, tmp_path / "run/mp_rank_00_model_states.pt")
    with pytest.raises(UcpError, match="no args"):
        open_source(tmp_path / "run", program=PROGRAM)
