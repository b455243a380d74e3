#!/usr/bin/env python3
"""Convert a DeepSpeed checkpoint to a universal one. Flags as deepspeed/checkpoint/ds_to_universal.py.

tools/ds_to_universal.py --input_folder run/global_step100 --output_folder run/global_step100_universal

Writes the output folder in one pass (no temporary copies), proves it against the digests of the save, and points
run/latest_universal to it. Exit code 0, or 1 with the reason. With --share auto several processes, on machines that see
one disk, share the work, where torchrun, srun or mpirun starts them:

srun -N 4 --ntasks-per-node 1 tools/ds_to_universal.py --share auto --input_folder ... --output_folder ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.training.launch import LaunchInfo
from megatron.training.launchers import LaunchError
from megatron.ucp.convert_command import main
from megatron.ucp.shares import Share


def launched() -> Share | None:
    launch = LaunchInfo.from_environment()
    return Share(launch.rank, launch.world_size) if launch.world_size > 1 else None


if __name__ == "__main__":
    try:
        sys.exit(main(launched=launched() if "--share" in sys.argv else None))
    except LaunchError as error:
        sys.exit(f"error: {error}")
