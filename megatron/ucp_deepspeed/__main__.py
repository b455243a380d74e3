"""Run a program that cannot be edited as if it had called `install()`.

torchrun --nproc-per-node 4 -m megatron.ucp_deepspeed train.py --its-own flags
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from megatron.ucp_deepspeed.installing import install


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python -m megatron.ucp_deepspeed SCRIPT [its arguments]", file=sys.stderr)
        return 2
    install()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
