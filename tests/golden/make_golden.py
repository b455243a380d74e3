"""Make the golden checkpoints of this version of the format (once for each version; others stay as they are):

    python tests/golden/make_golden.py

A model of some 2,000 parameters, two steps, saved in each way that files are laid out. Of what each converts to only
hashes are kept.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from golden.kinds import KINDS, TAG, flags_of, tensor_hashes

from harness.ranks import run_ranks
from matrix.recording import train, write_dataset
from megatron.ucp.convert import convert
from megatron.ucp.digest import total
from megatron.ucp.manifest import FORMAT_VERSION, read_manifest

if __name__ == "__main__":
    home, expected = HERE / f"version{FORMAT_VERSION}", {}
    for kind, (world_size, _) in KINDS.items():
        with tempfile.TemporaryDirectory() as scratch:
            data = write_dataset(Path(scratch) / "golden_text_document")
            run_ranks(world_size, train, flags_of(kind, data, save=Path(scratch) / kind, save_interval=2))
            saved = Path(scratch) / kind / TAG
            convert(saved, Path(scratch) / "universal", num_workers=1)
            expected[kind] = {
                "digest": total(read_manifest(saved).digests),
                "universal": tensor_hashes(Path(scratch) / "universal"),
            }
            shutil.rmtree(home / kind, ignore_errors=True)
            shutil.copytree(saved, home / kind)
    (home / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
