"""One module knows what is where in DeepSpeed's files of optimizer states."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = "megatron/ucp/sources/optimizer_file.py"
OF_LIVE_OPTIMIZERS = {"megatron/engine/deepspeed_names.py": {"single_partition_of_fp32_groups"}}
"""An attribute of DeepSpeed's optimizer, which has the name of what it is saved as."""
NAMES = {
    *("base_optimizer_state", "single_partition_of_fp32_groups", "fp32_flat_groups", "param_slice_mappings"),
    *("group_paddings", "partition_count", "param_alignment_paddings", "ds_zero_partition_groups"),
}


def names_in(source: str) -> set[str]:
    """Those that the code has as strings of their own; docstrings and messages are longer."""
    constants = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return NAMES & {value for value in constants if isinstance(value, str)}


def test_only_its_reader_names_what_is_in_it():
    files = [path for room in ("megatron", "tools", "tb_analysis") for path in (ROOT / room).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): names_in(path.read_text()) for path in files}
    assert found.pop(HOME) == NAMES
    assert {file: names for file, names in found.items() if names} == OF_LIVE_OPTIMIZERS


def test_planted_fault():
    assert names_in('"""param_slice_mappings tell"""\nflats = state["fp32_flat_groups"]') == {"fp32_flat_groups"}
