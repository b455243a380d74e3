"""What stands beside us in other people's environments: megatron-core under our name, no transformers, no plots."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(tmp_path) -> Path:
    """Where megatron-core is installed: a portion of the namespace package `megatron`, without an __init__.py."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("NAME = 'megatron-core'\n")
    return tmp_path


def _run(code: str, *folders: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "DS_ACCELERATOR": "cpu"}
    return subprocess.check_output([sys.executable, "-c", code], text=True, env=environ, cwd="/").splitlines()[-1]


@pytest.mark.parametrize("order", ["core first", "core last", "core alone on the path"])
def test_megatron_core_and_this_package_are_imported_side_by_side(order: str, site):
    folders = {"core first": [site, ROOT], "core last": [ROOT, site], "core alone on the path": [site]}[order]
    code = "import megatron.core, megatron.ucp.layout, megatron; print(megatron.core.NAME, bool(megatron.__version__))"
    assert _run(code, *folders) == "megatron-core True"


def test_install_imports_little():
    """torch, deepspeed, numpy and safetensors are what this part needs; Trainer's replacements wait for its import."""
    heavy = ("transformers", "matplotlib", "pandas", "tensorboard", "accelerate", "megatron.training", "megatron.data")
    code = (
        "import sys; from megatron import ucp_deepspeed; before = set(sys.modules); ucp_deepspeed.install(); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert _run(code, ROOT) == "[]"


def test_uninstall_puts_everything_back():
    code = """
from deepspeed.runtime.engine import DeepSpeedEngine as engine
from megatron import ucp_deepspeed
import sys
stock = engine.load_checkpoint, engine.save_checkpoint
ucp_deepspeed.install(); ucp_deepspeed.install()
import transformers.trainer as trainer
ours = engine.load_checkpoint, engine.save_checkpoint
assert ours[0] is not stock[0] and ours[1] is not stock[1]
from transformers.trainer_utils import get_last_checkpoint
assert trainer.get_last_checkpoint is get_last_checkpoint
assert get_last_checkpoint.__module__ == "megatron.ucp_deepspeed.trainer"
ucp_deepspeed.uninstall()
assert (engine.load_checkpoint, engine.save_checkpoint) == stock
assert not [finder for finder in sys.meta_path if "megatron" in type(finder).__module__]
assert trainer.get_last_checkpoint.__module__ == "transformers.trainer_utils"
print("back")
"""
    assert _run(code, ROOT) == "back"


def test_a_script_that_cannot_be_edited(tmp_path):
    """`python -m megatron.ucp_deepspeed train.py --lr 1`: its own arguments, name and folder."""
    script = tmp_path / "train.py"
    (tmp_path / "beside.py").write_text("HERE = 'beside'\n")
    script.write_text(
        "import sys, beside\n"
        "from deepspeed.runtime.engine import DeepSpeedEngine as engine\n"
        "if __name__ == '__main__':\n"
        "    print(engine.load_checkpoint.__code__.co_filename.endswith('installing.py'), sys.argv[1:], beside.HERE)\n"
    )
    command = [sys.executable, "-m", "megatron.ucp_deepspeed", script, "--lr", "1"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    out = subprocess.check_output(command, text=True, env=environ, cwd="/").splitlines()[-1]
    assert out == "True ['--lr', '1'] beside"


def test_a_deepspeed_with_other_names_is_refused():
    code = """
from deepspeed.runtime.engine import DeepSpeedEngine as engine
from megatron import ucp_deepspeed
stock = engine.load_checkpoint
del engine.zero_nvme_offload_optimizer
try:
    ucp_deepspeed.install()
except RuntimeError as error:
    print("refused" if "zero_nvme_offload_optimizer" in str(error) and engine.load_checkpoint is stock else error)
"""
    assert _run(code, ROOT) == "refused"
