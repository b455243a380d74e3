"""Config.validate: each wrong configuration is refused with what to do, several at once, and a right one passes."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron.config.arguments import SECTIONS
from megatron.config.config import Config
from megatron.config.data import DataConfig
from megatron.config.errors import ConfigError
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("d.bin", "d.idx", "v.json", "m.txt"):
        (tmp_path / name).touch()
    return Config(
        model=ModelConfig(num_layers=4, hidden_size=48, num_attention_heads=12, seq_length=32),
        run=RunConfig(micro_batch_size=2, global_batch_size=8, train_iters=20),
        optimizer=OptimizerConfig(lr=1e-3),
        data=DataConfig(
            data_path=(str(tmp_path / "d"),), vocab_file=str(tmp_path / "v.json"), merge_file=str(tmp_path / "m.txt")
        ),
    )


def changed(config: Config, **values: Any) -> Config:
    """`config` with fields replaced, wherever they are. Derived sizes are derived anew."""
    for section, owner in SECTIONS.items():
        mine = {f.name: values[f.name] for f in dataclasses.fields(owner) if f.name in values}
        if mine:
            derived = ("ffn_hidden_size", "num_key_value_heads", "kv_channels", "max_position_embeddings",
                       "moe_ffn_hidden_size")  # fmt: skip
            fresh = dict.fromkeys(derived) if section == "model" else {}
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **{**fresh, **mine})}
            )
    return config


def problems_of(config: Config, world_size: int = 4) -> str:
    with pytest.raises(ConfigError) as caught:
        config.validate(world_size)
    return str(caught.value)


def test_a_right_configuration_passes(config: Config) -> None:
    assert config.validate(4) == config


@pytest.mark.parametrize(
    "values",
    [
        {"add_bias_linear": False, "untie_embeddings_and_output_weights": True, "num_key_value_heads": 4},
        {"precision": "bf16", "zero_stage": 2, "recompute_granularity": "full", "recompute_method": "block"},
        {"precision": "fp16", "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1},
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "lr_warmup_fraction": 0.1},
        {"normalization": "rmsnorm", "swiglu": True, "position_embedding_type": "rope", "num_key_value_heads": 3,
         "rope_scaling_type": "llama3", "tensor_model_parallel_size": 4, "add_bias_linear": False},
        {"kv_channels": 7, "qk_layernorm": True, "use_rotary_position_embeddings": True, "rotary_percent": 0.5},
        {"position_embedding_type": "alibi", "embed_layernorm": True, "ds_sequence_parallel_size": 2},
        {"use_parallel_residual": True, "untie_embeddings_and_output_weights": True, "add_output_layer_bias": True},
        {"add_position_embedding": False, "max_position_embeddings": 8},
        {"position_embedding_type": "rope", "max_position_embeddings": 8},
        {"tensor_model_parallel_size": 4, "num_attention_heads": 6, "num_key_value_heads": 2},
        {"num_experts": (4,), "topk": 2, "moe_expert_parallel_size": 4, "zero_stage": 1},
        {"num_experts": (4, 1), "moe_expert_parallel_size": 2, "ds_sequence_parallel_size": 2, "zero_stage": 1},
        {"num_experts": (6, 4), "moe_train_capacity_factor": 1.25, "moe_router_score_function": "sigmoid",
         "moe_shared_expert_intermediate_size": 9, "moe_router_jitter": 0.1, "tensor_model_parallel_size": 2},
        {"num_experts": (3, 4, 5, 1), "expert_interval": 1, "pipeline_model_parallel_size": 2},
    ],
    ids=["shapes", "bf16-zero2", "3d", "wsd", "llama", "qwen", "bloom", "neox", "no-positions", "rope-needs-no-table",
         "fewer-kv-heads-than-ranks", "ep4", "ep2-of-sp2-and-one-layer-without", "deepseek", "a-number-a-layer"],
)  # fmt: skip
def test_what_is_built_passes(config: Config, values: dict[str, Any]) -> None:
    changed(config, **values).validate(4)


CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("heads", {"num_attention_heads": 10}, ["heads do not divide the hidden size", "heads of", "12"]),
    ("adapters-without-a-rank", {"lora_target_modules": ("q_proj",)}, ["adapters without a rank"]),
    ("adapters",
     {"lora_rank": 2, "lora_alpha": -1.0, "lora_target_modules": ("gate_proj", "q_proj"), "lora_fused": True},
     ["adapters that add nothing", "gate_proj is no matrix", "q_proj and k_proj and v_proj have one"]),
    ("adapters-of-experts", {"lora_rank": 2, "num_experts": (4,), "lora_target_modules": ("up_proj",)},
     ["up_proj is no matrix of this model"]),
    ("gelu-and-swiglu", {"swiglu": True, "exact_gelu": True}, ["an exact GELU in an MLP that has none"]),
    ("kv-heads", {"num_key_value_heads": 5}, ["key/value heads do not divide the query heads", "4 or 6"]),
    ("kv-channels", {"kv_channels": 0}, ["a head has no features", "--kv-channels 0"]),
    ("positions", {"max_position_embeddings": 16}, ["--max-position-embeddings 32"]),
    ("dropout", {"hidden_dropout": 1.5}, ["--hidden-dropout is out of range"]),
    ("layers", {"num_layers": 0}, ["--num-layers is too small"]),
    ("recompute", {"recompute_method": "uniform"}, ["--recompute-granularity full"]),
    ("tp-heads", {"tensor_model_parallel_size": 16},
     ["cannot be cut over 16 tensor parallel ranks", "12 query heads", "at most 12", "9, 10, 11 or 12"]),
    ("tp-kv-features", {"tensor_model_parallel_size": 4, "num_key_value_heads": 1, "kv_channels": 3},
     ["cannot be cut over 4", "1 key/value heads of 3 features", "at most 3", "size of 1, 2 or 3"]),
    ("tp-mlp", {"tensor_model_parallel_size": 4, "ffn_hidden_size": 2}, ["MLPs of 2", "at most 2", "of 1 or 2"]),
    ("tp-experts", {"tensor_model_parallel_size": 4, "num_experts": (4,), "moe_ffn_hidden_size": 3},
     ["MLPs of 3 and 192", "at most 3"]),
    ("tp-shared-expert", {"tensor_model_parallel_size": 4, "num_experts": (4,),
                          "moe_shared_expert_intermediate_size": 2}, ["MLPs of 2 and 192", "at most 2"]),
    ("pp-layers", {"pipeline_model_parallel_size": 5}, ["more pipeline stages than blocks", "at most 4"]),
    ("world", {"tensor_model_parallel_size": 3}, ["world size 4", "a multiple of 3", "start 3 or 6 ranks"]),
    ("no-pp", {"no_pipeline_parallel": True, "pipeline_model_parallel_size": 2}, ["--no-pipeline-parallel with"]),
    ("zero2-pp", {"zero_stage": 2, "pipeline_model_parallel_size": 2}, ["refuses ZeRO-2", "--zero-stage 1"]),
    (
        "sequence-parallel",
        {"sequence_parallel": True, "tensor_model_parallel_size": 4, "seq_length": 30},
        ["--sequence-parallel cannot cut", "--seq-length 30", "--seq-length 28 or 32"],
    ),
    (
        "ulysses",
        {"ds_sequence_parallel_size": 8, "num_attention_heads": 12, "micro_batch_size": 1},
        ["cut into 8 equal parts", "12 query and 12 key/value heads", "--ds-sequence-parallel-size of 1, 2 or 4"],
    ),
    (
        "ulysses-kv",
        {"ds_sequence_parallel_size": 4, "num_key_value_heads": 2, "micro_batch_size": 1},
        ["cannot be cut into 4 equal parts", "--ds-sequence-parallel-size of 1 or 2"],
    ),
    (
        "ulysses-uneven-tp",
        {"ds_sequence_parallel_size": 2, "tensor_model_parallel_size": 5},
        ["cannot be cut into 2 equal parts", "on 5 tensor parallel ranks", "--ds-sequence-parallel-size of 1"],
    ),
    ("expert-parallel", {"moe_expert_parallel_size": 2}, ["expert parallelism without experts", "give --num-experts"]),
    ("experts-ep", {"num_experts": (6,), "moe_expert_parallel_size": 4},
     ["cannot be dealt to 4 ranks", "--num-experts 6", "a multiple of 4", "--moe-expert-parallel-size of 1 or 2"]),
    ("experts-ep-in-one-layer", {"num_experts": (4, 6), "moe_expert_parallel_size": 4},
     ["--num-experts 4 6", "--moe-expert-parallel-size of 1 or 2"]),
    ("ep-dp", {"num_experts": (12,), "moe_expert_parallel_size": 3},
     ["cannot be dealt to the data parallel ranks", "4 data x sequence parallel ranks", "a divisor of 4",
      "--moe-expert-parallel-size of 1, 2 or 4"]),
    ("ep-tp", {"num_experts": (4,), "moe_expert_parallel_size": 4, "tensor_model_parallel_size": 2},
     ["2 data x sequence parallel ranks", "--moe-expert-parallel-size of 1 or 2"]),
    ("ep-zero", {"num_experts": (4,), "moe_expert_parallel_size": 0}, ["--moe-expert-parallel-size is too small"]),
    ("topk", {"num_experts": (4,), "topk": 5}, ["--topk 5 with --num-experts 4", "1 to 4", "--topk of at most 4"]),
    ("topk-of-the-fewest", {"num_experts": (4, 2), "topk": 3}, ["--num-experts 4 2", "--topk of at most 2"]),
    ("topk-zero", {"num_experts": (4,), "topk": 0}, ["--topk is too small"]),
    ("no-experts", {"num_experts": (0,)}, ["a layer without experts", "1 (an ordinary MLP) or more"]),
    ("expert-interval-0", {"num_experts": (4,), "expert_interval": 0}, ["--expert-interval is too small"]),
    ("rotary-base", {"use_rotary_position_embeddings": True, "rope_theta": 0.0}, ["--rope-theta is too small"]),
    ("epsilon", {"layernorm_epsilon": -1.0}, ["--layernorm-epsilon is too small"]),
    ("expert-interval", {"num_experts": (4,), "expert_interval": 5},
     ["no block has experts", "--expert-interval 5 with --num-layers 4", "--expert-interval of 1 to 4"]),
    ("expert-list", {"num_experts": (4, 4, 4)}, ["--num-experts 4 4 4 for blocks 1 3", "one number, or 2"]),
    ("expert-width", {"num_experts": (4,), "moe_ffn_hidden_size": 0}, ["--moe-ffn-hidden-size is too small"]),
    ("jitter", {"num_experts": (4,), "moe_router_jitter": 1.0}, ["--moe-router-jitter is out of range", "value < 1"]),
    ("left-out-nothing", {"exclude_frozen_parameters": True},
     ["nothing is frozen", "without --lora-rank or --freeze-parameters", "drop --exclude-frozen-parameters"]),
    ("left-out-no-base", {"exclude_frozen_parameters": True, "lora_rank": 2},
     ["no checkpoint that has them", "give --pretrained-checkpoint"]),
    ("left-out-export", {"exclude_frozen_parameters": True, "freeze_parameters": ("embedding.*",), "save": "runs/a",
                         "save_interval": 2, "pretrained_checkpoint": "model", "export_hf_interval": 2},
     ["an export needs all weights", "drop one of the two"]),
    ("sparsemixer-eps", {"num_experts": (4,), "moe_sparsemixer_eps": 1.5}, ["--moe-sparsemixer-eps is out of range"]),
    ("longrope-factors", {"position_embedding_type": "rope", "rope_scaling_type": "longrope",
                          "rope_short_factors": (1.0,), "rope_long_factors": (0.0, 1.0)},
     ["--rope-short-factors of 1 numbers", "--rope-long-factors of 2 numbers, the least 0", "2 numbers above 0"]),
    ("longrope-scales", {"position_embedding_type": "rope", "rope_scaling_type": "longrope", "rope_long_mscale": 0.0,
                         "rope_short_factors": (1.0, 1.0), "rope_long_factors": (2.0, 1.0)},
     ["--rope-long-mscale is out of range", "more than 0"]),
    ("aux-loss", {"num_experts": (4,), "moe_aux_loss_coeff": -0.1}, ["--moe-aux-loss-coeff", "0 or more"]),
    ("capacity", {"num_experts": (4,), "moe_train_capacity_factor": 0.0},
     ["--moe-train-capacity-factor is out of range", "more than 0"]),
    ("rotary-and-alibi", {"use_rotary_position_embeddings": True, "position_embedding_type": "alibi"},
     ["rotary positions and ALiBi at once", "drop one of the two"]),
    ("rotary-percent", {"use_rotary_position_embeddings": True, "rotary_percent": 0.3},
     ["nothing of a head is rotated", "0.3 of 4 features", "--rotary-percent of at least 0.5"]),
    ("rotary-percent-range", {"position_embedding_type": "rope", "rotary_percent": 1.5}, ["0 <= value <= 1"]),
    ("rope-factor", {"position_embedding_type": "rope", "rope_scaling_type": "ntk", "rope_scaling_factor": 0.5},
     ["--rope-scaling-factor 0.5", "1 or more"]),
    ("rope-llama3", {"position_embedding_type": "rope", "rope_scaling_type": "llama3", "rope_low_freq_factor": 4.0},
     ["--rope-low-freq-factor 4", "the low factor below the high one"]),
    ("output-bias", {"add_output_layer_bias": True},
     ["--add-output-layer-bias without --untie-embeddings-and-output-weights"]),
    ("global-batch", {"global_batch_size": 12}, ["a multiple of 8 = 2 x 4", "--global-batch-size 8 or 16",
                                                 "--micro-batch-size of 1 or 3"]),
    ("rampup-words", {"rampup_batch_size": (4, 4), "train_iters": None, "train_samples": 80},
     ["--rampup-batch-size is not a ramp-up", "START INCREMENT SAMPLES"]),
    ("rampup-iters", {"rampup_batch_size": (8, 8, 80), "global_batch_size": 16}, ["iterations are not of one size",
                                                                               "--train-samples or --train-tokens"]),
    ("rampup-end", {"rampup_batch_size": (8, 8, 80), "train_iters": None, "train_samples": 80,
                    "global_batch_size": None}, ["needs its end", "--global-batch-size"]),
    ("rampup-steps", {"rampup_batch_size": (8, 16, 80), "train_iters": None, "train_samples": 80,
                      "global_batch_size": 32}, ["does not lead to the global batch size", "--global-batch-size 40"]),
    ("rampup-ranks", {"rampup_batch_size": (4, 4, 80), "train_iters": None, "train_samples": 80,
                      "global_batch_size": 16}, ["4, 12 with --micro-batch-size 2 on 4 data", "of 8 = 2 x 4"]),
    ("rampup-schedule", {"rampup_batch_size": (8, 8, 80), "train_iters": None, "train_tokens": 8000,
                         "global_batch_size": 16, "lr_warmup_iters": 2}, ["has its schedule in iters"]),
    ("micro-batch", {"micro_batch_size": 0}, ["--micro-batch-size is too small"]),
    ("lr-missing", {"lr": None}, ["--lr is missing"]),
    ("min-lr", {"min_lr": 1.0}, ["--min-lr is outside 0..lr"]),
    ("beta", {"adam_beta2": 1.0}, ["--adam-beta2 is out of range"]),
    ("warmup", {"lr_warmup_iters": 20}, ["leaves nothing to decay", "at most 19"]),
    ("warmup-fraction", {"lr_warmup_fraction": 1.0}, ["--lr-warmup-fraction 1"]),
    ("warmup-twice", {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 2}, ["given more than once"]),
    ("unit", {"lr_warmup_samples": 8}, ["a run in iters has its schedule in samples", "--lr-warmup-samples"]),
    ("wsd", {"lr_decay_style": "WSD"}, ["WSD needs the length", "--lr-wsd-decay-iters"]),
    ("decay-ends", {"weight_decay_incr_style": "linear"}, ["--start-weight-decay"]),
    ("decay-falls", {"weight_decay_incr_style": "linear", "start_weight_decay": 0.2, "end_weight_decay": 0.1},
     ["does not rise"]),
    ("loss-scale", {"initial_loss_scale": 12.0}, ["not a power of two", "12"]),
    ("both-schedules", {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
     ["from the flags and from the checkpoint"]),
    ("length-missing", {"train_iters": None}, ["the length of the run is missing"]),
    ("length-twice", {"train_samples": 80}, ["given twice"]),
    ("interval", {"log_interval": 0}, ["--log-interval is too small"]),
    ("save-interval", {"save": "run"}, ["--save without --save-interval"]),
    ("universal", {"universal_checkpoint": True}, ["--universal-checkpoint without --load"]),
    ("load-tag", {"load_tag": "global_step1"}, ["--load-tag without --load"]),
    ("go-back", {"go_back_on_state_change": True},
     ["--go-back-on-state-change without --verify-state-every", "--go-back-on-state-change without --save"]),
    ("export", {"save": "run", "save_interval": 4, "export_hf_interval": 6}, ["--export-hf-interval is no multiple"]),
    ("export-without-save", {"export_hf_interval": 6}, ["--export-hf-interval is no multiple of --save-interval"]),
    ("keep-verified", {"keep_newest_verified": True}, ["--keep-newest-verified without --keep-last"]),
    ("no-data", {"data_path": ()}, ["--data-path is missing"]),
    ("no-dataset", {"data_path": ("nowhere/x",)}, ["nowhere/x.bin", "nowhere/x.idx", "tools/preprocess_data.py"]),
    ("blend", {"data_path": ("a", "b", "c")}, ["neither one prefix nor pairs of weight and prefix"]),
    ("split", {"split": "a,b"}, ["--split is not three proportions"]),
    ("split-no-train", {"split": "0,1,1"}, ["--split is not three proportions"]),
    ("vocab-missing", {"vocab_file": None}, ["--vocab-file is missing"]),
    ("vocab-absent", {"vocab_file": "nowhere.json"}, ["--vocab-file does not exist", "nowhere.json"]),
    ("hf", {"tokenizer_type": "HFTokenizer"}, ["--tokenizer-model is missing"]),
    ("null", {"tokenizer_type": "NullTokenizer"}, ["give --vocab-size"]),
    ("json-absent", {"deepspeed_config": "nowhere.json"}, ["nowhere.json", "cannot be read"]),
]  # fmt: skip


@pytest.mark.parametrize(("values", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_wrong_configuration_says_what_to_do(config: Config, values: dict[str, Any], parts: list[str]) -> None:
    text = problems_of(changed(config, **values))
    for part in parts:
        assert part in text


@pytest.mark.parametrize("head_dim", [3, 7, 24, 49, 96])
def test_the_least_rotary_percent_that_is_advised_is_legal(config: Config, head_dim: int) -> None:
    rotary = {"use_rotary_position_embeddings": True, "kv_channels": head_dim}
    text = problems_of(changed(config, rotary_percent=0.001, **rotary))
    advised = float(text.split("--rotary-percent of at least ")[1].split()[0])
    assert changed(config, rotary_percent=advised, **rotary).validate(4).model.rotary_dim == 2


def test_all_problems_at_once(config: Config) -> None:
    wrong = changed(config, lr=None, num_attention_heads=10, split="x", save="run", global_batch_size=9)
    with pytest.raises(ConfigError) as caught:
        wrong.validate(4)
    assert len(caught.value.problems) == 5
    assert "5 problems" in str(caught.value)


def test_prefix_with_suffix_is_recognised(config: Config) -> None:
    path = config.data.data_path[0]
    assert f"takes the prefix: {path}" in problems_of(changed(config, data_path=(path + ".bin",)))


def test_json_that_is_no_json(config: Config, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{")
    assert "is not JSON" in problems_of(changed(config, deepspeed_config=str(tmp_path / "ds.json")))


def test_global_batch_size_is_resolved(config: Config) -> None:
    open_config = changed(config, global_batch_size=None)
    assert open_config.validate(4).run.global_batch_size == 8
    assert changed(open_config, tensor_model_parallel_size=2).validate(4).run.global_batch_size == 4


def test_length_in_samples_and_tokens(config: Config) -> None:
    by_samples = changed(config, train_iters=None, train_samples=85).validate(4)
    assert by_samples.train_iters == 10
    assert by_samples.optimizer.lr_decay_samples == 85
    assert changed(config, train_tokens=32 * 8 * 3 + 1).validate(4).train_iters == 4
    by_tokens = changed(config, lr_decay_tokens=320, lr_warmup_tokens=64).validate(4).optimizer
    assert (by_tokens.lr_decay_samples, by_tokens.lr_warmup_samples) == (10, 2)
    assert by_tokens.lr_decay_tokens is None


def test_topology(config: Config) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    topology = parallel.topology(8)
    assert (topology.tp_size, topology.pp_size, topology.dp_size, topology.world_size) == (2, 2, 2, 8)
    with pytest.raises(ConfigError, match="start 4 or 8 ranks"):
        parallel.topology(6)


@pytest.mark.parametrize(("true", "multiple", "tp_size", "padded"), [(50257, 128, 1, 50304), (50257, 128, 2, 50432),
                                                                     (96, 8, 4, 96), (97, 8, 4, 128)])  # fmt: skip
def test_padded_vocab_size(true: int, multiple: int, tp_size: int, padded: int) -> None:
    model = ModelConfig(2, 64, 4, 32, vocab_size=true, make_vocab_size_divisible_by=multiple)
    assert model.padded_vocab_size(tp_size) == padded


def test_swiglu_width_is_upstreams() -> None:
    assert ModelConfig(2, 4096, 32, 32, swiglu=True).ffn_hidden_size == 10880  # int(4*4096*2/3 / 64) * 64


@pytest.mark.parametrize(
    "words", ["0 nowhere 1 {d}", "0.3 {d} 0.7 {d}", "'0.3 {d} 0.7 {d}'", "'0.3 {d}' '0.7 {d}'", "'{d}'"]
)
def test_blends_are_read_as_the_data_reads_them(config: Config, words: str) -> None:
    path = config.data.data_path[0]
    blended = changed(config, data_path=tuple(shlex.split(words.format(d=path)))).validate(4)
    assert {entry.prefix for entry in blended.data.blend} == {path}
    assert sum(entry.weight for entry in blended.data.blend) == 1
