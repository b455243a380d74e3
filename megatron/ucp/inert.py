"""What the few classes become that DeepSpeed puts into its files, so that they open without importing DeepSpeed: their
attributes, none of their methods. Classes that only a program knows: stand_ins.py.
"""

from __future__ import annotations

import argparse
from typing import Any


class Inert:
    """What a class of DeepSpeed's becomes: its attributes, none of its methods."""

    def __init__(self, *values: Any):
        if values:
            self.values = values

    def __repr__(self) -> str:
        return f"{type(self).__name__}({vars(self)})"


class FragmentAddress(Inert):
    """A parameter's fragment in a flat partition."""

    start: int
    numel: int


class LossScaler(Inert):
    """For the dynamic one also cur_iter, last_overflow_iter, cur_hysteresis, ..."""

    cur_scale: float
    dynamic: bool


class DynamicLossScaler(LossScaler):
    pass


class SubparamShape(Inert):
    """patterns, shape, partition_dim."""


def _enum_value(value: Any) -> Any:
    return value


INERT: list[tuple[Any, str]] = [
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (SubparamShape, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
    (_enum_value, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (argparse.Namespace, "argparse.Namespace"),
]
"""(what it becomes, its name in the file)."""
