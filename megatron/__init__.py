"""Megatron on DeepSpeed with Universal Checkpointing built in."""

__version__ = "0.1.0"
