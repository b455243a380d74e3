"""What one flag decides for another, and flags that only matter beside another: each said in a note.

notes = fill_in_implied({"model": {...}, "parallel": {...}, ...}, names={"--topk", ...})   # fills in and explains
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

Values = dict[str, Any]


def fill_in_implied(sections: Mapping[str, Values], names: Collection[str]) -> list[str]:
    """Add derived values to the given ones, in place; returns the notes."""
    notes = [*_implied_zero_stage(sections["parallel"], sections["run"])]
    notes += _implied_pipeline(sections["parallel"], sections["run"])
    model = sections["model"]
    if sections["data"].get("tokenizer_type") == "NullTokenizer" and "--vocab-size" in names and model["vocab_size"]:
        model["vocab_size"] += 1  # As upstream: so many words, and after them the end-of-document id.
    if model.get("use_rotary_position_embeddings") or model.get("position_embedding_type") in ("rope", "alibi"):
        model["add_position_embedding"] = False  # As upstream: rotary replaces the table.
    if model.get("position_embedding_type") == "rope":
        model["use_rotary_position_embeddings"] = True  # Two names of one thing, which a Source must agree on.
    return notes + [*_without_effect(sections, names)]


def _implied_zero_stage(parallel: Values, run: Values) -> Iterator[str]:
    path = run.get("deepspeed_config")
    stage = _stage_of(path) if path is not None and "zero_stage" not in parallel else None
    if stage is not None:
        parallel["zero_stage"] = stage
        yield f"ZeRO stage {stage} is taken from {path}: --zero-stage is not given"


def _implied_pipeline(parallel: Values, run: Values) -> Iterator[str]:
    """Which model one pipeline stage is: upstream's plain one without --deepspeed, its PipelineModule with it."""
    is_plain = parallel.get("no_pipeline_parallel", False)
    stage, pp_size = parallel.get("zero_stage", 0), parallel.get("pipeline_model_parallel_size", 1)
    if not run.get("deepspeed"):
        yield "--deepspeed is not given: the engine is DeepSpeed's all the same"
        parallel["no_pipeline_parallel"] = is_plain or pp_size == 1
    elif stage >= 2 and pp_size == 1 and not is_plain:
        parallel["no_pipeline_parallel"] = True
        yield f"the plain model is built, as with --no-pipeline-parallel: DeepSpeed's pipeline takes no ZeRO-{stage}"


def _stage_of(path: str) -> int | None:
    """zero_optimization.stage of a DeepSpeed JSON; None where it cannot be read (validate says why)."""
    try:
        stage = json.loads(Path(path).read_text())["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stage if stage in (0, 1, 2, 3) else None


def _without_effect(sections: Mapping[str, Values], names: Collection[str]) -> Iterator[str]:
    model, optimizer, checkpoint = sections["model"], sections["optimizer"], sections["checkpoint"]
    precision = optimizer.get("precision", "fp32")
    has_rotary = model.get("use_rotary_position_embeddings") or model.get("position_embedding_type") == "rope"
    has_experts = max(model.get("num_experts", (1,))) > 1
    rows = (
        (has_experts, "--num-experts",
         "--topk --moe-router-topk --expert-interval --moe-ffn-hidden-size --moe-shared-expert-intermediate-size "
         "--moe-router-score-function --moe-sparsemixer-eps --no-moe-normalize-topk --moe-router-jitter "
         "--moe-input-jitter-eps "
         "--moe-loss-coeff --moe-aux-loss-coeff --moe-z-loss-coeff --moe-train-capacity-factor "
         "--moe-expert-capacity-factor --moe-eval-capacity-factor --moe-min-capacity --disable-moe-token-dropping"),
        (model.get("moe_router_score_function") == "sparsemixer", "--moe-router-score-function sparsemixer",
         "--moe-sparsemixer-eps"),
        (model.get("moe_router_score_function") != "sparsemixer", "another score function than sparsemixer",
         "--no-moe-normalize-topk"),
        (model.get("moe_train_capacity_factor", model.get("moe_eval_capacity_factor")) is not None,
         "--moe-train-capacity-factor", "--moe-min-capacity"),
        (model.get("moe_token_dropping", True), "token dropping (--disable-moe-token-dropping is given)",
         "--moe-train-capacity-factor --moe-expert-capacity-factor --moe-eval-capacity-factor"),
        (has_rotary, "--use-rotary-position-embeddings",
         "--rotary-percent --rotary-position-embeddings-theta --rotary-base --rope-scaling-type --use-rope-scaling"),
        (model.get("rope_scaling_type") not in (None, "longrope"), "--rope-scaling-type linear, ntk or llama3",
         "--rope-scaling-factor"),
        (model.get("rope_scaling_type") == "llama3", "--rope-scaling-type llama3",
         "--rope-low-freq-factor --rope-high-freq-factor"),
        (model.get("rope_scaling_type") in ("llama3", "longrope"), "--rope-scaling-type llama3 or longrope",
         "--rope-original-max-position-embeddings"),
        (model.get("rope_scaling_type") == "longrope", "--rope-scaling-type longrope",
         "--rope-short-factors --rope-long-factors --rope-short-mscale --rope-long-mscale"),
        (model.get("add_bias_linear") is False, "--disable-bias-linear", "--add-qkv-bias --add-attention-bias"),
        (model.get("recompute_granularity") == "full", "--recompute-granularity full",
         "--recompute-num-layers --checkpoint-num-layers"),
        (optimizer.get("optimizer") == "sgd", "--optimizer sgd", "--sgd-momentum"),
        (optimizer.get("optimizer", "adam") in ("adam", "muon"), "--optimizer adam or muon",
         "--adam-beta1 --adam-beta2 --adam-eps"),
        (optimizer.get("optimizer") == "lion", "--optimizer lion", "--lion-beta1 --lion-beta2"),
        (optimizer.get("optimizer") == "muon", "--optimizer muon", "--muon-momentum"),
        (precision == "fp16", "--fp16",
         "--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis"),
        (precision == "bf16", "--bf16", "--accumulate-allreduce-grads-in-fp32"),
        (optimizer.get("lr_decay_style") == "WSD", "--lr-decay-style WSD",
         "--lr-wsd-decay-style --lr-wsd-decay-iters --lr-wsd-decay-samples"),
        ("save" in checkpoint, "--save", "--save-interval"),
    )  # fmt: skip
    for is_used, condition, dependents in rows:
        given = [name for name in dependents.split() if name in names]
        if given and not is_used:
            yield f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect without {condition}"
