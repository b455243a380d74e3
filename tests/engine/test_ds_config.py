"""The DeepSpeed configuration: from flags, merged with JSON; contradictions show both values."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from harness.ranks import run_ranks
from matrix.recording import command_line, train, write_dataset
from megatron.config.config import Config
from megatron.config.errors import ConfigError
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.engine.ds_config import MUST_AGREE, deepspeed_config
from megatron.ucp.topology import Topology

# As the universal checkpointing artifact's scripts write it.
ARTIFACT: dict[str, Any] = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "steps_per_print": 1,
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": False},
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 50,
        "hysteresis": 2,
        "min_loss_scale": 1,
        "initial_scale_power": 12,
    },
    "wall_clock_breakdown": False,
}


def config(stage: int = 1, **optimizer: Any) -> Config:
    return Config(
        model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32),
        run=RunConfig(micro_batch_size=2, global_batch_size=4, train_iters=10),
        parallel=ParallelConfig(zero_stage=stage),
        optimizer=OptimizerConfig(lr=1e-3, **optimizer),
    )


def test_from_flags_alone() -> None:
    values, notes = deepspeed_config(config(clip_grad=0.7), Topology(pp_size=2))
    assert notes == []
    assert values["train_batch_size"] == 4
    assert values["train_micro_batch_size_per_gpu"] == 2
    assert values["gradient_accumulation_steps"] == 2
    assert values["gradient_clipping"] == 0.7
    assert values["zero_optimization"] == {"stage": 1}
    assert values["fp16"] == values["bf16"] == {"enabled": False}
    assert "optimizer" not in values and "scheduler" not in values and "data_types" not in values
    assert values["zero_allow_untested_optimizer"] is True
    assert values["zero_force_ds_cpu_optimizer"] is False
    assert values["steps_per_print"] > 10**6
    assert deepspeed_config(config(), Topology(dp_size=2))[0]["gradient_accumulation_steps"] == 1


def test_artifact_json_beside_a_fixed_loss_scale() -> None:
    asked = config(precision="fp16", loss_scale=12.0)
    values, notes = deepspeed_config(asked, Topology(pp_size=2), copy.deepcopy(ARTIFACT))
    assert values["fp16"] == ARTIFACT["fp16"]
    assert values["gradient_clipping"] == 1.0
    assert values["steps_per_print"] == 1
    (note,) = notes
    assert "fp16.loss_scale 0 (not 12.0 of --loss-scale)" in note
    assert "initial_scale_power" not in note  # no flag asked for another


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"train_batch_size": 8}, ["train_batch_size", "8 in the JSON, 4 from --global-batch-size"]),
        ({"train_micro_batch_size_per_gpu": 1}, ["1 in the JSON, 2 from --micro-batch-size"]),
        ({"gradient_accumulation_steps": 3}, ["3 in the JSON, 2 from", "tp1 pp2 dp1"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage", "2 in the JSON, 1 from --zero-stage"]),
        ({"fp16": {"enabled": False}}, ["fp16.enabled", "False in the JSON, True from --fp16"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", "True in the JSON, False from --bf16"]),
        ({"bfloat16": {"enabled": True}, "bf16": None}, ["bf16.enabled"]),
        ({"elasticity": {"enabled": True}}, ["elasticity.enabled", "refused"]),
        ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning.enabled", "refused"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ["offload_optimizer", "refused"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, ["offload_optimizer", "whole"]),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size", "refused"]),
        ({"zero_optimization": {"mics_shard_size": 2}}, ["mics_shard_size", "refused"]),
        ({"checkpoint": {"use_node_local_storage": True}}, ["use_node_local_storage", "one folder"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, ["cannot be resumed"]),
        ({"zero_optimization": True}, ["zero_optimization in the DeepSpeed JSON is not an object"]),
        (
            {"optimizer": {"type": "Lamb"}},
            ["optimizer in the DeepSpeed JSON is refused", "Lamb", "change the training"],
        ),
        ({"optimizer": {"type": "Muon"}}, ["--optimizer muon trains the same under all"]),
        ({"optimizer": {"type": "OneBitAdam"}}, ["cannot be resumed elsewhere"]),
        ({"optimizer": {"params": {}}}, ["it has no type"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradiction_shows_both_values(change: dict[str, Any], parts: list[str]) -> None:
    user = {**ARTIFACT, **change}
    user = {key: value for key, value in user.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(config(precision="fp16"), Topology(pp_size=2), user)
    for part in parts:
        assert part in str(caught.value)


def test_all_contradictions_at_once() -> None:
    user = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(config(), Topology(), user)
    assert len(caught.value.problems) == 3


def test_auto_is_filled_from_the_flags() -> None:
    expected, _ = deepspeed_config(config(clip_grad=0.5), Topology(dp_size=2))
    auto: dict[str, Any] = {}
    for first, *rest in MUST_AGREE:
        if first not in expected:  # only of some flags
            continue
        auto.setdefault(first, {})
        if rest:
            auto[first][rest[0]] = "auto"
        else:
            auto[first] = "auto"
    auto["zero_optimization"]["reduce_bucket_size"] = "auto"
    auto["gradient_clipping"] = "auto"
    values, notes = deepspeed_config(config(clip_grad=0.5), Topology(dp_size=2), auto)
    assert values == expected
    (note,) = notes
    assert "zero_optimization.reduce_bucket_size" in note
    assert "auto" not in json.dumps(values)


def test_json_wins_elsewhere_and_says_so() -> None:
    user = {"gradient_clipping": 0.3, "zero_optimization": {"stage": 1, "reduce_bucket_size": 500}, "dump_state": True}
    values, notes = deepspeed_config(config(), Topology(), user)
    assert values["gradient_clipping"] == 0.3
    assert values["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 500}
    assert values["dump_state"] is True
    assert notes == ["the DeepSpeed JSON wins over the flags: gradient_clipping 0.3 (not 1.0 of --clip-grad)"]


def test_fp16_block_keeps_deepspeeds_defaults_but_takes_given_flags() -> None:
    user = {"fp16": {"enabled": True}}
    values, _ = deepspeed_config(config(precision="fp16", loss_scale_window=77), Topology(), user)
    assert values["fp16"] == {"enabled": True, "loss_scale_window": 77}
    alone, _ = deepspeed_config(config(precision="fp16"), Topology())
    assert alone["fp16"]["initial_scale_power"] == 32
    assert alone["fp16"]["loss_scale"] == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("user", [None, {"zero_optimization": {"stage": 0}}], ids=["flags", "json"])
def test_low_precision_without_zero_runs_as_zero1(precision: str, user: dict[str, Any] | None) -> None:
    values, notes = deepspeed_config(config(stage=0, precision=precision), Topology(dp_size=2), user)
    assert values["zero_optimization"]["stage"] == 1
    assert any("ZeRO-1" in note for note in notes)
    assert deepspeed_config(config(stage=0), Topology(dp_size=2), user)[0]["zero_optimization"]["stage"] == 0


def test_bf16_gradients_in_fp32_only_if_asked_for() -> None:
    assert "data_types" not in deepspeed_config(config(precision="bf16"), Topology())[0]
    asked = config(precision="bf16", accumulate_allreduce_grads_in_fp32=True)
    assert deepspeed_config(asked, Topology())[0]["data_types"] == {"grad_accum_dtype": "fp32"}


def test_optimizer_block_is_kept_and_filled() -> None:
    user = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-6, "torch_adam": True}}}
    values, notes = deepspeed_config(config(weight_decay=0.2), Topology(), user)
    assert values["optimizer"]["params"] == {
        "lr": 1e-3,
        "eps": 1e-6,
        "torch_adam": True,
        "weight_decay": 0.2,
        "betas": [0.9, 0.999],
    }
    assert any("AdamW of the DeepSpeed JSON" in note for note in notes)


def test_scheduler_block_is_dropped_with_a_note() -> None:
    values, notes = deepspeed_config(config(), Topology(), {"scheduler": {"type": "WarmupLR"}})
    assert "scheduler" not in values
    assert any("scheduler" in note for note in notes)


def test_inputs_are_not_changed() -> None:
    user = {"optimizer": {"type": "Adam"}, "fp16": {"enabled": True}, "scheduler": {}, "gradient_clipping": 0.1}
    before, asked = copy.deepcopy(user), config(precision="fp16")
    deepspeed_config(asked, Topology(), user)
    assert user == before
    assert asked == dataclasses.replace(asked)


def test_config_and_ds_config_do_not_import_deepspeed() -> None:
    code = (
        "import sys, megatron.config.config, megatron.config.arguments, megatron.engine.schedule;"
        "assert 'torch' not in sys.modules, 'torch';"
        "import megatron.engine.ds_config;"
        "assert 'deepspeed' not in sys.modules, 'deepspeed'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["reduce_scatter", "contiguous_gradients"])
def test_what_deepspeed_asserts_with_experts_is_refused(name: str) -> None:
    user = {"zero_optimization": {name: False}}
    deepspeed_config(config(), Topology(), user)
    with pytest.raises(ConfigError, match=f"zero_optimization.{name} false"):
        deepspeed_config(config(), Topology(dp_size=2, ep_size=2), user)


def test_features_that_are_off_are_not_refused() -> None:
    block = {"zero_hpz_partition_size": 1, "mics_shard_size": -1, "zero_quantized_weights": False}
    assert deepspeed_config(config(), Topology(), {"zero_optimization": block})[0]["zero_optimization"]["stage"] == 1


# -- what is there only to say that it is off -----------------------------------------------------------------------


def _keys_of_deepspeed() -> list[str]:
    """Every name of DeepSpeed's table that may stand at the top of the JSON, and those that it has taken out."""
    from deepspeed.runtime import config as deepspeed_config_module
    from deepspeed.runtime import constants

    names = {
        value
        for name, value in vars(constants).items()
        if name.isupper() and isinstance(value, str) and value.isidentifier() and value.islower()
    }
    return sorted(names | set(deepspeed_config_module._REMOVED_TOP_LEVEL_CONFIG_KEYS))


def test_whatever_is_switched_off_is_as_if_it_were_not_there() -> None:
    keys = _keys_of_deepspeed()
    assert len(keys) > 60 and {"curriculum_learning", "elasticity", "amp", "sparse_gradients"} <= set(keys)
    plain, _ = deepspeed_config(config(), Topology(dp_size=2))
    for key in keys:
        if key in plain or key == "bfloat16":  # the old name of bf16, which the flags give
            continue
        nested = {"a": {"enabled": False}, "b": {"shared": {"enabled": False}}}
        for value in ({"enabled": False}, {"enabled": False, "other": {"x": 1}}, False, None, nested):
            found, notes = deepspeed_config(config(), Topology(dp_size=2), {key: value})
            assert found == plain, (key, value)
            assert any(key in note for note in notes), (key, value)
    for key in ("fp16", "bf16", "zero_optimization"):
        assert deepspeed_config(config(), Topology(dp_size=2), {key: False})[0] == plain
    for key, value in (("mics_shard_size", -1), ("zeropp_loco_param", None), ("zero_quantized_weights", False)):
        assert deepspeed_config(config(), Topology(dp_size=2), {"zero_optimization": {key: value}})[0] == plain


def test_what_is_off_does_not_stop_deepspeed(tmp_path) -> None:
    """A real run with everything that DeepSpeed knows switched off at once."""
    from deepspeed.runtime import config as deepspeed_config_module

    off: dict[str, Any] = {key: {"enabled": False} for key in _keys_of_deepspeed()}
    kept = ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler", "train_batch_size", "gradient_clipping")
    off = {
        key: value
        for key, value in off.items()
        if key not in kept and key not in deepspeed_config(config(), Topology(dp_size=2))[0]
    }
    off["zero_optimization"] = dict.fromkeys(deepspeed_config_module._REMOVED_ZERO_CONFIG_KEYS, False)
    (tmp_path / "ds.json").write_text(json.dumps(off))
    data = write_dataset(tmp_path / "off_text_document")
    with_it, without = (
        run_ranks(1, train, command_line(data, iters=2, num_layers=1, zero=1, **flags))[0].losses
        for flags in ({"deepspeed_config": tmp_path / "ds.json"}, {})
    )
    assert with_it == without


@pytest.mark.parametrize(
    "key", ["amp", "elasticity", "curriculum_learning", "eigenvalue", "nebula", "quantize_training"]
)
def test_what_deepspeed_has_taken_out_is_refused_where_it_is_on(key) -> None:
    with pytest.raises(ConfigError, match=f"{key}.enabled in the DeepSpeed JSON is refused"):
        deepspeed_config(config(), Topology(dp_size=2), {key: {"enabled": True}})
