"""What Hugging Face's Trainer and Accelerate keep beside DeepSpeed's folder, brought along for another number of ranks.

DeepSpeed's part of such a folder is not all that its program resumes from: model, schedule, counters and random states
lie beside it. They are copied as they are, and each rank has a random state where one was saved for it.

    copies = found_beside(Path("checkpoint-500"), "global_step500", dp_size=3)      # [(path there, name here), ...]

Sources of these names: transformers/trainer.py (_save_checkpoint, _load_rng_state), accelerate/utils/constants.py.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from megatron.ucp.errors import listed
from megatron.ucp.pointers import POINTERS
from megatron.ucp.sources import is_checkpoint

log = logging.getLogger(__name__)

_RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


@dataclass(frozen=True)
class _Program:
    mark: str
    """A file by which its folders are known."""
    of_rank: re.Pattern[str]
    """Names of random states; the number is the rank's, and none where there was one rank."""
    name: str
    alone: str
    """What a state of a rank is called, and that of the only one."""


_PROGRAMS = (
    _Program("trainer_state.json", re.compile(r"rng_state(?:_(\d{1,9}))?\.pth"), "rng_state_{}.pth", "rng_state.pth"),
    _Program(
        "random_states_0.pkl",
        re.compile(r"random_states_(\d{1,9})\.pkl"),
        "random_states_{}.pkl",
        "random_states_0.pkl",
    ),
)


def found_beside(folder: Path, tag: str, dp_size: int) -> list[tuple[Path, str]]:
    """Files to copy from a run folder, and their paths in the one that is made. Of a program's folder everything but
    checkpoints and pointers to them; of any other DeepSpeed's scripts. Links and checkpoints other than `tag` are left
    out, and said so."""
    program = next((known for known in _PROGRAMS if (folder / known.mark).is_file()), None)
    if program is None:
        return [(folder / name, name) for name in _RECOVERY_SCRIPTS if _is_file(folder / name)]
    states: dict[int, Path] = {}
    copies, links, others = [], [], []
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            links.append(path.name)
        elif match := program.of_rank.fullmatch(path.name):
            states[int(match[1] or 0)] = path
        elif path.is_dir() and is_checkpoint(path):
            others += [path.name] if path.name != tag else []
        elif path.is_dir():
            inside = sorted(path.rglob("*"))
            links += [p.relative_to(folder).as_posix() for p in inside if p.is_symlink()]
            copies += [(p, p.relative_to(folder).as_posix()) for p in inside if _is_file(p)]
        elif _is_file(path) and path.name not in POINTERS:
            copies.append((path, path.name))
    if links:
        log.warning("warning: links in %s are not followed, and left out: %s", folder, listed(links))
    if others:  # Accelerate has one for each model
        log.warning("warning: of %s only %s is written anew, and left out are: %s", folder, tag, listed(others))
    if states and dp_size > len(states):
        log.warning(
            "warning: %s has random states of %d ranks: the others of %d begin from their seeds",
            *(folder, len(states), dp_size),
        )
    for rank in range(dp_size):
        if rank in states:
            copies.append((states[rank], program.alone if dp_size == 1 else program.name.format(rank)))
    return copies


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
