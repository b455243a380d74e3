"""One loss curve over a machine lost and a machine come back? A picture, a table and a verdict.

python compare.py RUN_DIR         # exit code 0 on PASS, 1 on FAIL
"""

import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tb_analysis.curves import Curve
from tb_analysis.event_files import read_curve

KEY = "lm-loss-training/lm loss"
_CHOSEN = re.compile(r"^elastic: (\d+) rank\(s\) as ([^,;]+)", re.MULTILINE)
_LOADED = re.compile(r"^\[(\d\d:\d\d:\d\d)\] resuming .*\(iteration (\d+), ", re.MULTILINE)
_STEP = re.compile(r"^\[(\d\d:\d\d:\d\d)\] (?:stopping at )?iteration +(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Stretch:
    """What one set of ranks has trained."""

    ranks: int
    topology: str
    loaded: int
    """The iteration of the checkpoint that it went on from; 0 for none."""
    last: int
    """That it told of."""


def stretches(logs: list[Path]) -> list[Stretch]:
    """In the order in which they began. Rank 0 tells, whichever agent has it."""
    found = []
    for log in logs:
        text = log.read_text(errors="replace")
        starts = [match.start() for match in _CHOSEN.finditer(text)]
        for start, end in itertools.pairwise([*starts, len(text)]):
            part = text[start:end]
            chosen, loaded, steps = _CHOSEN.match(part), _LOADED.search(part), _STEP.findall(part)
            if chosen and steps:
                at = int(loaded[2]) if loaded else 0
                found.append((steps[0][0], Stretch(int(chosen[1]), chosen[2].strip(), at, int(steps[-1][1]))))
    return [stretch for _, stretch in sorted(found, key=lambda each: each[0])]


def main(folder: Path) -> int:
    tensorboard = folder / "tensorboard"
    source, control = (read_curve(next(tensorboard.glob(f"{role}_*")), KEY) for role in ("source", "control"))
    elastic = read_curve(tensorboard / "target_elastic", KEY)
    steps, deltas = source.delta(elastic)
    _, of_control = source.delta(control)
    ulp = float(np.spacing(np.float32(np.max(source.values))))
    bound = 2 * max(float(np.max(np.abs(of_control))), 2 * ulp)
    worst = float(np.max(np.abs(deltas)))
    parts = stretches(sorted((folder / "logs").glob("agent_*.log")))

    faults = []
    if worst > bound:
        faults.append(f"max |d| {worst:.1e} is above the bound {bound:.1e}")
    if missing := sorted(set(source.steps.tolist()) - set(elastic.steps.tolist())):
        faults.append(f"{len(missing)} iterations are missing, the first {missing[0]}")
    if [part.ranks for part in parts] != [4, 3, 4]:
        faults.append(f"the job ran on {[part.ranks for part in parts]} ranks, not on 4, 3 and 4")
    lost = [max(0, before.last - after.loaded) for before, after in itertools.pairwise(parts)]
    if lost[1:] and lost[1]:
        faults.append(f"growing lost {lost[1]} iterations")

    lines = [f"{'ranks':>5} {'topology':14} {'from checkpoint':>15} {'to iteration':>12}"]
    lines += [f"{part.ranks:5} {part.topology:14} {part.loaded:15} {part.last:12}" for part in parts]
    lines.append(
        f"{len(steps)} iterations, max |d| {worst:.1e}, bound {bound:.1e} (control {np.max(np.abs(of_control)):.1e})"
    )
    lines += [f"FAIL: {fault}" for fault in faults] or ["PASS"]
    print("\n".join(lines))
    (folder / "verdict.txt").write_text("\n".join(lines) + "\n")
    _draw(source, elastic, parts, (steps, deltas), bound, folder / "loss.png")
    print(f"picture: {folder / 'loss.png'}")
    return 1 if faults else 0


def _draw(
    source: Curve, elastic: Curve, parts: list[Stretch], delta: tuple[np.ndarray, np.ndarray], bound: float, path: Path
) -> None:
    figure, (above, ranks, below) = plt.subplots(3, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1, 1.5))
    above.plot(source.steps, source.values, color="#8CC5E8", lw=5, label="never stopped: 4 ranks")
    above.plot(elastic.steps, elastic.values, color="#0B3C5D", lw=1.2, label="elastic: an agent killed, and come back")
    starts = [part.loaded for part in parts]
    for part, end in zip(parts, [*starts[1:], int(elastic.last_step)], strict=True):
        ranks.fill_between([part.loaded, end], 0, part.ranks, step="post", color="#009E73", alpha=0.35)
        ranks.text((part.loaded + end) / 2, 0.4, f"{part.ranks}: {part.topology}", ha="center", fontsize=8)
        if part.loaded:
            for axes in (above, ranks, below):
                axes.axvline(part.loaded, color="grey", ls=":", lw=1)
    steps, deltas = delta
    below.semilogy(steps, np.maximum(np.abs(deltas), 1e-8), color="#0B3C5D", lw=1)
    below.axhline(bound, color="#B22222", ls="--", lw=1, label=f"bound {bound:.1e}: twice the control")
    above.set(ylabel="LM loss", title="Four machines, one lost, one come back: one curve")
    ranks.set(ylabel="ranks", ylim=(0, 4.6), yticks=range(5))
    below.set(ylabel="|difference|\n(1e-8: none)", xlabel="iteration", ylim=(5e-10, None))
    above.legend()
    below.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
