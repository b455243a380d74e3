"""Checkpoints that other programs saved, which are kept here as archives.

run = unpacked("megatron_core/llama_pp2", tmp_path)        # tmp_path / "llama_pp2"
runs = all_of("megatron_core", folder)                     # name -> its run folder
"""

import tarfile
from pathlib import Path

HERE = Path(__file__).parent


def unpacked(sample, folder):
    with tarfile.open(HERE / f"{sample}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / Path(sample).name


def all_of(program, folder):
    names = [path.name.removesuffix(".tar.xz") for path in sorted((HERE / program).glob("*.tar.xz"))]
    return {name: unpacked(f"{program}/{name}", folder) for name in names}
