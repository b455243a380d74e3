"""Install Megatron-DeepSpeed with Universal Checkpointing: ``pip install -e .``

Two small C++ modules (data indices, state digest) are built with pybind11. Both are optional: without a
compiler the install goes through and the Python versions, which give the same bits, are used.
"""

import re
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "megatron/__init__.py").read_text()).group(1)

ParallelCompile(default=2).install()


def cpp_extension(module: str, source: str) -> Pybind11Extension:
    # -O3: the digest kernel relies on auto-vectorisation, which -O2 of older compilers leaves out.
    extension = Pybind11Extension(module, [source], cxx_std=17, extra_compile_args=["-O3"])
    extension.optional = True
    return extension


setup(
    name="megatron-deepspeed-ucp",
    version=VERSION,
    description="Train large language models with Megatron on DeepSpeed; resume them under any parallelism.",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron", "megatron.*"]),
    package_data={"megatron": ["py.typed"], "megatron.ucp": ["FORMAT.md"]},
    ext_modules=[
        cpp_extension("megatron.data._index_helpers", "megatron/data/index_helpers.cpp"),
        cpp_extension("megatron.ucp._kernel", "megatron/ucp/kernel.cpp"),
    ],
    cmdclass={"build_ext": build_ext},
    # What the checkpoint library and ucp_deepspeed need, in programs of others.
    install_requires=[
        # Tried: 2.11.0 and 2.13.0. A machine that has its own is not made to download another.
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",
        "numpy==2.4.6",
        "safetensors==0.8.0",
        "pybind11==3.1.0",
        "ninja==1.13.2",
        "tqdm==4.70.1",
    ],
    extras_require={
        # What training here needs beside that.
        "train": [
            "transformers==5.23.0",
            "tokenizers==0.23.3",
            "sentencepiece==0.2.3",
            "tiktoken==0.14.0",
            "tensorboard==2.21.0",
            "matplotlib==3.11.2",
        ],
        # Triton comes with torch's CUDA build (2.13.0 asks for 3.7.1); with the CPU build the tests need it too.
        "dev": [
            *("pytest==9.2.0", "pytest-xdist==3.8.0", "hypothesis==6.170.15", "ruff==0.17.6", "triton>=3.7.1,<4"),
            # Programs of others whose checkpoints are resumed (tests/ucp_deepspeed).
            *("accelerate==1.15.0", "peft==0.21.2", "pytorch-lightning==2.6.6"),
            # What transformers reads .gguf files with (ucp import; examples/finetune_smollm2).
            "gguf==0.19.0",
        ],
        # What `make lint` and pre-commit need beside dev's; the tests do not.
        "lint": ["mypy==2.4.1", "codespell==2.4.3", "pre-commit>=4"],
        # NVIDIA Apex is not on PyPI: it is used where importable.
        "cuda": ["triton>=3.7.1,<4"],
        "plots": ["seaborn>=0.13"],
    },
    entry_points={"console_scripts": ["ucp = megatron.ucp.cli:main"]},
)
