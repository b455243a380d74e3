#!/usr/bin/env python3
"""Make a checkpoint that any topology starts from out of a model folder of Hugging Face's.

tools/hf_import.py SmolLM2-135M runs/smollm2/imported
torchrun --nproc-per-node 2 pretrain_gpt.py --load runs/smollm2/imported --finetune --use-checkpoint-args ...

The same as `ucp import`. Nothing has to be imported for training alone: --load takes the model folder itself.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.ucp.huggingface_commands import add_import, main

if __name__ == "__main__":
    sys.exit(main(add_import, __doc__))
