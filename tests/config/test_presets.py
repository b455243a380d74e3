"""--model-preset: what it sets, what replaces it, and what is said. The shapes: tests/model/test_presets.py."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from megatron.config.arguments import parse
from megatron.config.errors import ConfigError
from megatron.config.flag import flag_fields
from megatron.config.model import ModelConfig
from megatron.config.model_checks import model_problems
from megatron.config.presets import PRESETS

NAMED = (
    "gpt-125m",
    "gpt-350m",
    "gpt-7b",
    "gpt-176b",
    "llama-3.1-8b",
    "bloom-176b",
    "phi-3.5-moe-42b",
    "yulan-mini-2.4b",
    "mixtral-8x7b",
    "qwen3-0.6b",
    "smollm2-135m",
    "pythia-160m",
    "pythia-1b",
)


def parsed(name: str, *argv: str):
    return parse(["--deepspeed", "--micro-batch-size", "1", "--model-preset", name, *argv])


def test_all_are_there_and_every_family_has_a_tiny_one() -> None:
    assert set(NAMED) <= set(PRESETS)
    tiny = {preset.family for name, preset in PRESETS.items() if name.startswith("tiny-")}
    assert tiny >= {preset.family for preset in PRESETS.values()} and len(PRESETS) == len(NAMED) + 7


@pytest.mark.parametrize("name", PRESETS)
def test_values_are_fields_of_their_types_and_make_a_legal_model(name: str) -> None:
    specs = {spec.name: spec for spec in flag_fields(ModelConfig)}
    for field, value in PRESETS[name].values.items():
        spec = specs[field]
        for item in value if spec.is_list else (value,):
            assert type(item) is spec.type, field
            assert not spec.flag.choices or item in spec.flag.choices, field
    assert not list(model_problems(ModelConfig.of_preset(name)))
    with pytest.raises(TypeError):
        PRESETS[name].values["num_layers"] = 1


@pytest.mark.parametrize("name", PRESETS)
def test_from_the_command_line_alone(name: str) -> None:
    result = parsed(name)
    model = result.config.model
    for field, value in PRESETS[name].values.items():
        assert getattr(model, field) == value
        assert f"{field} " in result.notes[0]
    assert model.model_preset == name
    assert any("is not all of the published model" in note for note in result.notes) == bool(PRESETS[name].differs)


# Switches are written as switches, so that each field can be given as a flag.
LLAMA = shlex.split("""
    --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 8192 --ffn-hidden-size 14336
    --num-key-value-heads 8 --max-position-embeddings 131072 --vocab-size 128256 --normalization rmsnorm
    --layernorm-epsilon 1e-5 --swiglu --use-rotary-position-embeddings --rotary-base 500000 --use-rope-scaling
    --rope-scaling-factor 8 --untie-embeddings-and-output-weights --disable-bias-linear
    --hidden-dropout 0 --attention-dropout 0
""")


def test_a_preset_is_the_flags_that_it_stands_for() -> None:
    """Another spelling of the positions included: a checkpoint of the one resumes as the other."""
    written = parse(["--deepspeed", "--micro-batch-size", "1", *LLAMA]).config.model
    named = parsed("llama-3.1-8b").config.model
    both = [dataclasses.replace(m, model_preset=None, position_embedding_type="rope") for m in (written, named)]
    assert both[0] == both[1]


def test_a_flag_replaces_its_value_wherever_it_stands() -> None:
    result = parse(shlex.split("--seq-length 64 --num-layers 2 --model-preset llama-3.1-8b --micro-batch-size 1"))
    model = result.config.model
    assert (model.seq_length, model.num_layers, model.hidden_size) == (64, 2, 4096)
    note = next(note for note in result.notes if note.startswith("--model-preset"))
    assert note.endswith("; given otherwise: num_layers 2, seq_length 64") and "num_layers 32" not in note


def test_stated_sizes_stay_and_the_others_follow() -> None:
    gpt = parsed("gpt-125m", "--hidden-size", "1536").config.model
    assert (gpt.ffn_hidden_size, gpt.kv_channels, gpt.num_key_value_heads) == (6144, 128, 12)
    llama = parsed("llama-3.1-8b", "--hidden-size", "1024", "--num-attention-heads", "16").config.model
    assert (llama.ffn_hidden_size, llama.kv_channels, llama.num_key_value_heads) == (14336, 64, 8)
    qwen = parsed("qwen3-0.6b", "--hidden-size", "512").config.model
    assert qwen.kv_channels == 128
    moe = parsed("mixtral-8x7b", "--ffn-hidden-size", "96").config.model
    assert moe.moe_ffn_hidden_size == 96
    assert parsed("gpt-125m", "--seq-length", "128").config.model.max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("name", "argv", "positions"),
    [
        ("tiny-bloom", ["--use-rotary-position-embeddings"], "rope"),
        ("tiny-bloom", ["--position-embedding-type", "rope"], "rope"),
        ("tiny-llama", ["--position-embedding-type", "alibi"], "alibi"),
        ("tiny-llama", ["--position-embedding-type", "learned_absolute"], "learned_absolute"),
        ("tiny-gpt", ["--no-position-embedding"], "none"),
        ("tiny-gpt", [], "learned_absolute"),
    ],
)
def test_positions_can_be_replaced(name: str, argv: list[str], positions: str) -> None:
    model = parsed(name, *argv).config.model
    assert model.positions == positions
    assert not list(model_problems(model))


def test_flags_of_what_the_preset_switches_on_have_an_effect() -> None:
    assert not any("no effect" in note for note in parsed("tiny-moe", "--topk", "1", "--rotary-base", "5000").notes)
    assert any("no effect" in note for note in parsed("tiny-gpt", "--topk", "1").notes)


def test_unknown_preset_lists_the_known_ones_and_nothing_it_might_have_set() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed("lama-3.1-8b")
    text = str(caught.value)
    assert len(caught.value.problems) == 1 and all(name in text for name in PRESETS)


def test_what_no_preset_sets_is_still_required() -> None:
    with pytest.raises(ConfigError, match="--micro-batch-size is missing"):
        parse(["--model-preset", "tiny-gpt"])


def test_of_preset() -> None:
    model = ModelConfig.of_preset("tiny-moe", seq_length=32, vocab_size=101)
    assert (model.seq_length, model.vocab_size, model.num_experts, model.num_layers) == (32, 101, (4,), 4)
    with pytest.raises(KeyError):
        ModelConfig.of_preset("none")
