"""What transformers says of the model before and after, and whether the run went on as if it had never changed.

    python examples/finetune_smollm2/compare.py RUN_DIR HALF TRAIN_ITERS

PASS: each loss of both halves is within 1e-4 of the one of the run on one rank, the state that was loaded half way is
the one that was saved, and the loss on text that was kept back is lower than before. Writes RUN_DIR/loss.png.
"""

import json
import re
import sys
from pathlib import Path

import torch

TOLERANCE = 1e-4
PROMPT = "Shall I compare thee to a summer's day?"
LENGTH, NUM_TOKENS = 512, 40


def losses(log: str) -> dict[int, float]:
    return {int(i): float(x) for i, x in re.findall(r"iteration +(\d+)/\d+ \|.*? loss ([\d.]+)", log)}


def is_proven(log: str) -> bool:
    """The digest of what was loaded is that of what was saved."""
    return re.search(r"state digest [0-9a-f]{32} equals the one at save", log) is not None


def faults(halves: dict[int, float], whole: dict[int, float], half: int, train_iters: int) -> list[str]:
    """What is wrong with the losses by iteration, of both halves together and of the run on one rank."""
    wanted = set(range(1, train_iters + 1))
    found = [f"no loss of iteration {i}" for i in sorted(wanted - halves.keys() | wanted - whole.keys())]
    far = {i: abs(halves[i] - whole[i]) for i in wanted & halves.keys() & whole.keys()}
    found += [f"iteration {i} is {d:.1e} away" for i, d in sorted(far.items()) if not d <= TOLERANCE]
    if not 0 < half < train_iters:
        found.append("one of the halves is empty")
    return found


@torch.no_grad()
def judged(folder: Path, texts: list[str]) -> tuple[float, str]:
    """(mean loss a token, how the prompt goes on), by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :LENGTH]
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return total / count, tokenizer.decode(written[0], skip_special_tokens=True)


def draw(path: Path, halves: dict[int, float], whole: dict[int, float], half: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(list(whole), list(whole.values()), color="0.7", linewidth=5, label="one rank, never changed")
    for name, steps in (("tp3, ZeRO-1", range(1, half + 1)), ("dp2, ZeRO-3", range(half + 1, max(halves) + 1))):
        axes.plot(list(steps), [halves[i] for i in steps], marker=".", label=name)
    axes.set_xlabel("iteration"), axes.set_ylabel("training loss"), axes.legend(loc="lower left")
    axes.set_title("SmolLM2-135M, fine-tuned on Shakespeare and the King James Bible")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(folder: Path, half: int, train_iters: int) -> int:
    logs = {name: (folder / f"{name}.log").read_text() for name in ("tp3", "dp2", "one")}
    curves = {name: losses(log) for name, log in logs.items()}
    halves = {**curves["tp3"], **curves["dp2"]}
    found = faults(halves, curves["one"], half, train_iters)
    if curves["tp3"].keys() & curves["dp2"].keys():
        found.append("iterations were run twice")
    found += [] if is_proven(logs["dp2"]) else ["the state that was loaded half way is not proven to be the saved one"]
    texts = [json.loads(line)["text"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    results = {name: judged(folder / name, texts) for name in ("before", "after")}
    if not results["after"][0] < results["before"][0]:
        found.append("fine-tuning did not lower the loss on text that was kept back")
    far = max((abs(halves[i] - x) for i, x in curves["one"].items() if i in halves), default=float("nan"))
    print(f"\n{'':22}{'before':>12}{'after':>12}")
    print(f"{'loss, kept-back text':22}" + "".join(f"{results[name][0]:12.4f}" for name in ("before", "after")))
    print(f"largest distance of the losses of tp3 and dp2 ZeRO-3 to those of one rank: {far:.1e}")
    for name, (_, text) in results.items():
        print(f"\n{name}: {text}")
    if not found:
        draw(folder / "loss.png", halves, curves["one"], half)
    print("\n" + "\n".join([*found, "FAIL" if found else "PASS"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
