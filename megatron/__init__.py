"""Megatron on DeepSpeed with Universal Checkpointing built in."""

from pkgutil import extend_path

# megatron-core is a portion of a namespace package of this name, wherever it is installed: both are found.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"
