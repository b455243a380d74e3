#!/usr/bin/env python3
"""Make a model folder of Hugging Face's out of a checkpoint: native of any topology, universal, or of a run folder.

tools/hf_export.py runs/smollm2 hub/my-smollm2 --like SmolLM2-135M --dtype bfloat16

The same as `ucp export`: on a CPU, in one pass, without a process group; the digest of the weights is held against the
one that was saved. AutoModelForCausalLM.from_pretrained reads the folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.ucp.huggingface_commands import add_export, main

if __name__ == "__main__":
    sys.exit(main(add_export, __doc__))
