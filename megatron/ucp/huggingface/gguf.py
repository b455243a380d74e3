"""GGUF, as far as transformers reads it: a file becomes a model folder, its weights as fp32.

with unpacked("SmolLM2-135M-Instruct.Q4_1.gguf", near=output) as folder: convert(folder, output)

The whole model is in memory for that. Needs transformers and the package gguf, which nothing else here does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron.ucp.errors import UcpError, UnsupportedCheckpointError
from megatron.ucp.huggingface.folder import CONFIG
from megatron.ucp.safetensors_file import write_safetensors
from megatron.ucp.stored import StoredTensor
from megatron.ucp.torch_file import Record, StreamedTensor

SUFFIX = ".gguf"
_NEEDED = ("transformers", "gguf", "accelerate")


@contextlib.contextmanager
def unpacked(file: Path, near: Path) -> Iterator[Path]:
    """A folder beside `near`, which is removed at the end. Raises UnsupportedCheckpointError where transformers cannot
    read the file, and UcpError where a package is missing."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UcpError("reading GGUF needs packages that are not there", found=missing, do=f"pip install {missing[0]}")
    near.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(prefix=".gguf.", dir=near.parent))
    folder = around / file.stem
    try:
        folder.mkdir()
        _unpack(file, folder)
        yield folder
    finally:
        shutil.rmtree(around, ignore_errors=True)


def _unpack(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype="float32", **options)
    except Exception as error:  # of whatever transformers, gguf and the file make of each other
        raise UnsupportedCheckpointError(
            "transformers cannot read this file", found=f"{type(error).__name__}: {error}"[:400], where=file
        ) from error
    tokenizer.save_pretrained(str(folder))
    write_safetensors(
        folder / "model.safetensors",
        {name: _streamed(StoredTensor.of_torch(param)) for name, param in model.named_parameters()},
        {"format": "pt"},
    )
    # Written last, without what says that the weights are quantised: they are not any more.
    config = {key: _shortest(value) for key, value in model.config.to_dict().items() if key != "quantization_config"}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _streamed(tensor: StoredTensor) -> StreamedTensor:
    def write(record: Record) -> None:
        record.write(tensor.array())

    return StreamedTensor(tensor.shape, tensor.dtype, write)


def _shortest(value: Any) -> Any:
    """Numbers are kept as fp32 there: 9.999999747378752e-06 was meant as 1e-05."""
    if isinstance(value, float) and value == float(np.float32(value)):
        return float(str(np.float32(value)))
    if isinstance(value, dict):
        return {key: _shortest(entry) for key, entry in value.items()}
    return value
