"""One loss curve? The resumed runs beside the one that never stopped: a picture, a table and a verdict.

python compare.py RUN_DIR         # exit code 0 on PASS, 1 on FAIL
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAVED_AT, LAST = 20, 60
RUNS = {
    "control": "control: 2 ranks, ZeRO-2, another micro batch",
    "resumed_1": "resumed on 1 rank, ZeRO-1",
    "resumed_3": "resumed on 3 ranks, ZeRO-3",
}


def losses_of(folder: Path) -> dict[int, float]:
    state = json.loads((folder / f"checkpoint-{LAST}" / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def faults(folder: Path) -> list[str]:
    """Runs that did not train just the steps after the checkpoint: they would be compared with a copy of themselves."""
    steps = {name: (folder / f"{name}.log").read_text().count("'loss'") for name in RUNS}
    expected = LAST - SAVED_AT
    return [f"{name} trained {found} steps, not {expected}" for name, found in steps.items() if found != expected]


def main(folder: Path) -> int:
    if found := faults(folder):
        print("FAIL: " + "; ".join(found))
        return 1
    whole = losses_of(folder / "whole")
    after = range(SAVED_AT + 1, LAST + 1)
    deltas = {}
    for name in RUNS:
        losses = losses_of(folder / name)
        deltas[name] = {step: abs(losses[step] - whole[step]) for step in after}
    ulp = 2.0**-20  # of an fp32 loss between 8 and 16; a loss is a mean over ranks of sums over micro batches
    bound = 2 * max(*deltas["control"].values(), 2 * ulp)
    passed = True
    lines = [f"{'run':48} {'first |d|':>10} {'max |d|':>10} {'bound':>10}"]
    for name, label in RUNS.items():
        worst = max(deltas[name].values())
        verdict = "" if name == "control" else "PASS" if worst <= bound else "FAIL"
        passed &= verdict != "FAIL"
        lines.append(f"{label:48} {deltas[name][SAVED_AT + 1]:10.1e} {worst:10.1e} {bound:10.1e} {verdict}")
    print("\n".join(lines))
    (folder / "verdict.txt").write_text("\n".join(lines) + "\n")
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=(2, 1))
    never = "never stopped: 2 ranks, ZeRO-2"
    above.plot(list(whole), list(whole.values()), color="black", lw=3, alpha=0.35, label=never)
    for name, label in RUNS.items():
        losses = losses_of(folder / name)
        above.plot(list(after), [losses[step] for step in after], lw=1, label=label)
        below.semilogy(list(after), [max(deltas[name][step], 1e-8) for step in after], lw=1)
    why = f"bound {bound:.1e}: twice the control, at least four units in the last place"
    below.axhline(bound, color="black", ls="--", lw=1, label=why)
    above.axvline(SAVED_AT, color="grey", ls=":", lw=1)
    above.set(ylabel="loss", title="HF Trainer, killed after step 20's checkpoint, resumed on other ranks")
    below.set(ylabel="|difference|, 1e-8: none", xlabel="step", ylim=(5e-9, None))
    above.legend()
    below.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=110)
    print(f"picture: {folder / 'loss.png'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
