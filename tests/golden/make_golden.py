"""Make the golden checkpoints again (only when FORMAT.md's version changes): python tests/golden/make_golden.py

A GPT of 2,216 parameters, two steps under tp2 dp2 ZeRO-1, saved natively and converted.
"""

import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from harness.ranks import run_ranks
from matrix.recording import command_line, train, write_dataset
from megatron.ucp.convert import convert

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        data = write_dataset(Path(scratch) / "golden_text_document")
        argv = command_line(
            data, tp=2, zero=1, iters=2, save=scratch, num_layers=1, hidden_size=8, num_attention_heads=2,
            seq_length=8, max_position_embeddings=8,
        )  # fmt: skip
        run_ranks(4, train, argv)
        convert(Path(scratch) / "global_step2", Path(scratch) / "global_step2_universal", num_workers=1)
        for name in ("global_step2", "global_step2_universal"):
            shutil.rmtree(HERE / name, ignore_errors=True)
            shutil.copytree(Path(scratch) / name, HERE / name)
