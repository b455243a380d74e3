"""The shipped corpus as text again: RUN_DIR/train.jsonl, and RUN_DIR/held_out.jsonl, which nobody trains on.

python examples/finetune_smollm2/corpus.py RUN_DIR
"""

import json
import sys
from pathlib import Path

from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.tokenizer import TokenizerSpec

DATA = Path(__file__).resolve().parents[2] / "training_datasets"
NUM_TRAINED, NUM_HELD_OUT = 200, 20
"""Documents (a scene, a chapter); the set's order mixes them."""


def main(folder: Path) -> None:
    gpt2 = TokenizerSpec("GPT2BPETokenizer", DATA / "gpt2-vocab.json", DATA / "gpt2-merges.txt").build()
    documents = IndexedDataset(DATA / "gpt2_text_document")
    for name, first, last in (("train", 0, NUM_TRAINED), ("held_out", len(documents) - NUM_HELD_OUT, len(documents))):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for number in range(first, last):
                text = gpt2.detokenize([int(i) for i in documents[number] if i != gpt2.eod])
                file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
