"""What DeepSpeed's own engines ask for in a universal folder beside the tensors, whatever their ZeRO stage.

An engine looks for a file by the name that its own stage would have given it, and for groups and steps
where its own stage would have kept them. So every name and every place is filled, whatever stage the Source was.

    for relative, content in loader_files(source).items(): save(content, folder / relative)

Who reads what (DeepSpeed 0.19.8): `mp_rank_XX_model_states.pt` every engine but ZeRO-3's, which takes
`zero_pp_rank_0_mp_rank_XX_model_states.pt` (runtime/engine.py, _get_ckpt_name); of `zero/optimizer_state.pt` ZeRO-1, 2
and BF16_Optimizer take `param_groups`, one by one beside their own, and `ds_version` (runtime/base_optimizer.py,
load_hp_checkpoint_state_from_checkpoint_dir), ZeRO-3 `optimizer_state_dict` with `state[0]["step"]` and the first of
`param_groups` (runtime/zero/stage3.py, load_hp_checkpoint_state_from_checkpoint_dir_stage3).
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from megatron.ucp.errors import CorruptFileError, listed
from megatron.ucp.sources.source import Source
from megatron.ucp.stand_ins import Stranger, without_strangers
from megatron.ucp.stored import StoredTensor

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "zero/optimizer_state.pt"
_OF_STAGE_3 = "zero_pp_rank_0_"


def loader_files(source: Source) -> dict[str, Any]:
    """Content by relative path: steps, the optimizer's common state, model states. Raises CorruptFileError."""
    files = {path: _readable(path, content) for path, content in source.side_files().items()}
    steps = {name: step for name in source.manifest.parameters if (step := _step_object(source, name)) is not None}
    files |= {f"zero/{name}/step.pt": step for name, step in steps.items()}
    files |= {f"{_OF_STAGE_3}{path}": content for path, content in files.items() if path.startswith("mp_rank_")}
    if OPTIMIZER_FILE in files:
        content = dict(files[OPTIMIZER_FILE])
        groups = content.get("param_groups", [])
        state = {"step": next(iter(steps.values()))} if steps else {}
        content["optimizer_state_dict"] = {"state": {0: state}, "param_groups": groups}
        files[OPTIMIZER_FILE] = content
    return files


def _readable(path: str, content: Any) -> Any:
    """Without objects of unknown classes, which whoever reads the file could not load either."""
    kept, left_out = without_strangers(content)
    if left_out:
        log.warning("warning: left out of %s: %s", path, listed(left_out))
    return kept


def _step_object(source: Source, name: str) -> Any:
    """As the optimizer keeps it; a tensor where it counts for several parameters in one place."""
    step, counted = source.step_object(name), source.step(name)
    if isinstance(step, Stranger):
        raise CorruptFileError("an optimizer's step is no number", found=f"{step!r} of {name}", where=source.folder)
    is_counted_here = counted is None or (step is not None and float(step) == counted)
    return step if is_counted_here else StoredTensor.of_array(np.array(counted, dtype=np.float32))
