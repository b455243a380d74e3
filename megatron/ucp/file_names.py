"""The names of the files that DeepSpeed writes, and of ours beside them.

match = ZERO_FILE.match("zero_pp_rank_1_mp_rank_00_optim_states.pt")      # match[1], match[2]: ZeRO rank, mp rank

Source of the names: deepspeed/runtime/engine.py (_get_rank_zero_ckpt_name, _get_ckpt_name), runtime/pipe/module.py.
"""

from __future__ import annotations

import re

ZERO_FILE = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
STAGE3_MODEL_FILE = re.compile(r"^zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt$")
MODEL_FILE = re.compile(r"^mp_rank_(\d+)_model_states\.pt$")
DEALT_FILE = re.compile(r"^expp_rank_(\d+)_mp_rank_(\d+)_expert_states\.pt$")
"""Ours, not DeepSpeed's: what each ep rank has of experts that ZeRO does not partition."""
LAYER_FILE = re.compile(r"^layer_(\d+)(?:-model_(\d+))?-model_states\.pt$")
"""Without a topology that names tensor parallelism DeepSpeed leaves the second number out."""


def dealt_file(ep_rank: int, mp_rank: int) -> str:
    return f"expp_rank_{ep_rank}_mp_rank_{mp_rank:02d}_expert_states.pt"


def optimizer_file(zero_rank: int, mp_rank: int, is_bf16: bool) -> str:
    return f"{'bf16_' if is_bf16 else ''}zero_pp_rank_{zero_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"


def model_file(zero_rank: int, mp_rank: int, zero_stage: int) -> str:
    """Under ZeRO-3 each rank has one."""
    prefix = f"zero_pp_rank_{zero_rank}_" if zero_stage == 3 else ""
    return f"{prefix}mp_rank_{mp_rank:02d}_model_states.pt"
