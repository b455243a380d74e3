"""Write a DeepSpeed checkpoint anew as DeepSpeed itself would have saved it under another ZeRO stage or on other ranks.

Stock DeepSpeed, Hugging Face's Trainer and Accelerate load what comes out with no flag and none of our code:
masters, the optimizer's states and steps, loss scale, schedule, counters and the program's own state are as they were.
Of a run folder ("checkpoint-500" of Trainer, a folder of Accelerate's save_state) what lies beside DeepSpeed's files
comes along, so that the program resumes from the new folder as from its own.

    reshape("out/checkpoint-500", "out_on_3/checkpoint-500", NativeTarget.parse("zero2", dp_size=3))
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.ucp.commit import point_to, stage
from megatron.ucp.convert import Conversion, byte_counter, require_apart, whole_or_not_at_all, write_proven
from megatron.ucp.digest import total
from megatron.ucp.disk import require_space
from megatron.ucp.identity import Identity
from megatron.ucp.pointers import LATEST
from megatron.ucp.sources import find_checkpoint, open_source
from megatron.ucp.sources.deepspeed import DeepSpeedSource
from megatron.ucp.targets.beside import found_beside
from megatron.ucp.targets.deepspeed import write_native
from megatron.ucp.targets.native_target import NativeTarget, ZeroSettings, require_writable
from megatron.ucp.targets.universal import tensor_bytes

_SPARE_BYTES = 4 << 20
_WEIGHT_BYTES = 4
"""Of an element of the weights, at most."""


@dataclass(frozen=True)
class Reshaped(Conversion):
    global_batch: int | None
    """Samples a step, where the configuration in the checkpoint says it: a program that goes on counting steps has to
    go on with as many."""


def reshape(
    input_folder: str | Path,
    output_folder: str | Path,
    target: NativeTarget,
    *,
    num_workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Reshaped:
    """Writes `output_folder`, which is of the form of `input_folder`: of a checkpoint (global_stepN) one, and `latest`
    beside it unless that is the input's; of a run folder, whose `latest` is followed, one with that checkpoint in it.

    Raises before anything is written where the input is incomplete or cannot be written so, the output exists or the
    disk is too small; a failure later leaves no output. `progress(done, total)` in bytes, from several threads."""
    started = time.perf_counter()
    output = Path(str(output_folder).rstrip("/") or "/")
    folder = find_checkpoint(input_folder)
    inside = folder.relative_to(input_folder)
    require_apart(Path(input_folder), output)
    identity = Identity.of(folder)
    source = open_source(folder)
    groups = require_writable(source, target)
    assert isinstance(source, DeepSpeedSource)
    copies = found_beside(folder.parent, folder.name, target.dp_size) if inside.parts else []
    num_bytes = tensor_bytes(source.manifest)
    num_weights = sum(info.layout.numel for info in source.manifest.parameters.values())
    num_copied = sum(path.stat().st_size for path, _ in copies)
    require_space(output, num_bytes + _WEIGHT_BYTES * num_weights + num_copied + _SPARE_BYTES)
    write = functools.partial(write_native, target=target, groups=groups)
    staging = stage(output)
    with whole_or_not_at_all(staging, output, identity):
        written = staging / inside
        written.mkdir(parents=True, exist_ok=True)
        manifest = write_proven(write, source, written, num_workers, byte_counter(progress, num_bytes))
        for path, name in copies:
            (written.parent / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, written.parent / name)
        if inside.parts:
            point_to(written.parent, LATEST, written.name)
    if not inside.parts and output.parent.resolve() != folder.resolve().parent:
        point_to(output.parent, LATEST, output.name)
    return Reshaped(
        folder,
        output,
        manifest,
        total(manifest.digests),
        num_bytes,
        time.perf_counter() - started,
        0,
        ZeroSettings.of(source.model_states(0)).global_batch,
    )
