"""Which parameters are trained: --freeze-parameters, and those that begin to be trained late.

freeze(model, ("embedding.*",), context)        # collective; requires_grad False, before the engine is built
suffixes = parameters_trained_later(manifest)                # of the Source: name -> suffix of its parameter group

A parameter that was frozen in the Source has no moments: it starts with zeros, as on a first step. Adam divides a
young moment by 1 - beta^step, and ZeRO keeps one step for a whole group; with the others' step its first updates would
be several times too large. So it joins a group of its own, `decay_since_100`, whose step counts from there; the name
is saved with it, and later Targets put it into that group again.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from megatron.config.errors import ConfigError, Problem
from megatron.config.optimizer import SINCE
from megatron.parallel.agreement import gathered
from megatron.parallel.context import ParallelContext
from megatron.parallel.rank_errors import reported_by_rank_0
from megatron.ucp.manifest import Manifest
from megatron.ucp.naming.adapters import is_adapter

_FLAG = "--freeze-parameters"
_MOST_NAMES = 40


class UnsavedBufferError(TypeError):
    """A model has state that no checkpoint would carry."""


def freeze(model: nn.Module, patterns: Sequence[str], context: ParallelContext, *, but_adapters: bool = False) -> None:
    """Stop training the parameters whose canonical names match one of the shell-like patterns; `but_adapters`: and all
    that are no adapter's. Collective over the world. Raises ConfigError, on every rank, for a pattern that matches
    nothing anywhere and for a stage without anything to train."""
    for name, param in model.named_parameters():
        if _is_matched(name, patterns) or (but_adapters and not is_adapter(name)):
            param.requires_grad_(False)
    trained = {name: param.requires_grad for name, param in model.named_parameters()}
    everywhere = gathered((context.pp_rank, trained))
    problems = _problems(patterns, everywhere)
    if problems:
        with reported_by_rank_0(dist.get_rank()):
            raise ConfigError(problems)


def _problems(patterns: Sequence[str], everywhere: list[tuple[int, dict[str, bool]]]) -> list[Problem]:
    names = sorted({name for _, trained in everywhere for name in trained})
    problems = [
        Problem(
            f"{_FLAG} {pattern} matches no parameter",
            expected=", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else ""),
            flags=(_FLAG,),
            fix="give names of parameters, with * for any text, in quotes",
        )
        for pattern in patterns
        if not any(_is_matched(name, (pattern,)) for name in names)
    ]
    idle = sorted({stage for stage, trained in everywhere if not any(trained.values())})
    if idle:
        has_stages = len({stage for stage, _ in everywhere}) > 1
        where = (
            f" on pipeline stage {', '.join(map(str, idle))}: DeepSpeed's pipeline needs an optimizer on every stage, "
            "and gradients through it"
        )
        problems.append(
            Problem(
                "nothing is left to train" + where * has_stages,
                found=" ".join((_FLAG, *patterns)),
                flags=(_FLAG, "--pipeline-model-parallel-size"),
                fix="freeze less, or use fewer pipeline stages",
            )
        )
    return problems


def _is_matched(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def parameters_trained_later(source: Manifest) -> dict[str, str]:
    """Name -> what its group's name ends with, of the parameters that the Source has frozen and of those that were
    frozen at some time before. Others keep the group that a fresh run gives them."""
    suffixes = {}
    for name, info in source.parameters.items():
        if not info.is_trainable:
            suffixes[name] = f"{SINCE}{source.iteration or 0}"
        elif match := re.search(rf"{SINCE}\d+$", info.group):
            suffixes[name] = match[0]
    return suffixes


def refuse_buffers(model: nn.Module) -> None:
    """Raises UnsavedBufferError for persistent buffers: a resume under another topology would not restore them. (One
    that can be computed again, such as a table of angles, is registered with persistent=False.) Local."""
    found = sorted(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer is not None and name not in module._non_persistent_buffers_set
    )
    if found:
        raise UnsavedBufferError(
            f"{len(found)} persistent buffer(s) would not be carried by a checkpoint. Found: {', '.join(found)}. "
            "Expected: none. What to do: declare it as a parameter (and freeze it), or register it with "
            "persistent=False if it can be computed again."
        )
