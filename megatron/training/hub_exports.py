"""Model folders of Hugging Face's (of a run with adapters PEFT's) out of its own checkpoints, made while it trains.

    exports = HubExports.of(config.checkpoint, model)         # None without --export-hf-interval; on rank 0
    exports.after_save(folder, iteration)                     # of a durable one; starts nothing that waits
    exports.poll()                                            # at every step: tells what has ended, begins the next
    exports.finish()                                          # at the end: waits

Each is a process of its own (`ucp export`: no torch, one core at a low priority), so that training does not wait, and
what goes wrong there ends no run.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.checkpoint import CheckpointConfig
from megatron.ucp.export import config_json_of
from megatron.ucp.huggingface.config_json import family_of
from megatron.ucp.huggingface.folder import is_model_folder
from megatron.ucp.naming.gpt_model import GptModel

log = logging.getLogger(__name__)

_START = (
    "import os, sys; os.nice(10); sys.path[:0] = [sys.argv.pop(1)]; "
    "from megatron.ucp.cli import main; sys.exit(main(sys.argv[1:]))"
)


class HubExports:
    def __init__(self, interval: int, folder: Path, flags: list[str]):
        self._interval, self._folder, self._flags = interval, folder, flags
        self._waiting: list[Path] = []
        self._running: tuple[Path, subprocess.Popen[str]] | None = None

    @classmethod
    def of(cls, config: CheckpointConfig, model: Mapping[str, Any]) -> HubExports | None:
        """`model`: what the run's checkpoints will say of it. Raises UnsupportedCheckpointError where it has no name
        among Hugging Face's, before anything is trained."""
        if config.export_hf_interval is None or config.save is None:
            return None
        candidates = [config.export_hf_like, config.pretrained_checkpoint, config.load]
        like = next((Path(given) for given in candidates if given and is_model_folder(Path(given))), None)
        if config.export_hf_like is not None:
            like = Path(config.export_hf_like)
        found = GptModel.of(model)
        if found.lora_rank:
            family_of(found)
            flags = ["--format", "peft"] + (["--base", str(like)] if like is not None else [])
        else:
            config_json_of(found, None, like, None)
            flags = ["--like", str(like)] if like is not None else []
        save = Path(config.save)
        return cls(config.export_hf_interval, save.with_name(f"{save.name}_hf"), flags)

    def after_save(self, checkpoint: Path, iteration: int) -> None:
        if iteration % self._interval == 0:
            self._waiting.append(checkpoint)
            self.poll()

    def poll(self) -> None:
        if self._running is not None:
            checkpoint, process = self._running
            if process.poll() is None:
                return
            self._running = None
            self._tell(checkpoint, process)
        if self._waiting:
            self._begin(self._waiting.pop(0))

    def finish(self) -> None:
        """What is left, one after the other."""
        if self._running is not None or self._waiting:
            log.info("waiting for %d export(s)", len(self._waiting) + (self._running is not None))
        while self._running is not None or self._waiting:
            if self._running is not None:
                self._running[1].wait()
            self.poll()

    def close(self) -> None:
        """A run that ends with an error leaves no process behind; what it was writing is no model folder."""
        self._waiting.clear()
        if self._running is not None:
            self._running[1].terminate()
            self._running[1].communicate()
            self._running = None

    def _begin(self, checkpoint: Path) -> None:
        output = self._folder / checkpoint.name
        if output.exists():  # a run that went back, or saved its last iteration twice
            log.warning("warning: %s is there already: not exported again", output)
            return
        # As JSON: without lines of progress, which nobody reads until the end.
        arguments = ["export", str(checkpoint), str(output), "--num_workers", "1", "--json", *self._flags]
        root = str(Path(__file__).resolve().parents[2])
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, root, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                process_group=0,
            )
        except OSError as error:
            log.error("error: %s cannot be exported: %s", checkpoint, error)
            return
        self._running = checkpoint, process

    def _tell(self, checkpoint: Path, process: subprocess.Popen[str]) -> None:
        told = (process.communicate()[0] or "").strip()
        if process.returncode == 0:
            log.info("exported %s for Hugging Face's libraries, %s", checkpoint, self._folder / checkpoint.name)
        else:
            log.error("error: %s was not exported (exit code %d): %s", checkpoint, process.returncode, told[-1000:])
