#!/usr/bin/env python3
"""Convert a DeepSpeed checkpoint to a universal one. Flags as deepspeed/checkpoint/ds_to_universal.py.

tools/ds_to_universal.py --input_folder run/global_step100 --output_folder run/global_step100_universal

Writes the output folder in one pass (no temporary copies), proves it against the digests of the save, and points
run/latest_universal to it. Exit code 0, or 1 with the reason.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.ucp.convert_command import main

if __name__ == "__main__":
    sys.exit(main())
