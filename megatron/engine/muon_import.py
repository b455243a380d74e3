"""DeepSpeed's Muon without the compiler, until somebody steps with it.

Every engine of DeepSpeed's imports its Muon (runtime/zero/utils.py, is_zero_supported_optimizer), whose functions
are compiled where they are defined; that loads torch's inductor, about a second of processor time on every rank of
every start. Here they are compiled when they are first called.

    import_muon_uncompiled()        # local; before an engine is built

A program that has imported it already keeps what it has.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime import compiler

MUON = "deepspeed.runtime.zero.muon.original_muon"

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def import_muon_uncompiled() -> None:
    stock = compiler.compile
    compiler.compile = lambda: when_called(stock)
    try:
        importlib.import_module(MUON)
    finally:
        compiler.compile = stock


def when_called(stock: Callable[[], Decorator]) -> Decorator:
    """`stock()` compiles a function; this one compiles it with its first call."""

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = functools.cache(lambda: stock()(function))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            # Inside of another that is being compiled it is a part of that one.
            return (function if torch.compiler.is_compiling() else compiled())(*args, **kwargs)

        return call

    return decorator
