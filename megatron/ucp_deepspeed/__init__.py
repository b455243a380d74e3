"""Universal checkpointing for programs that train with DeepSpeed, and not with us.

    from megatron import ucp_deepspeed
    ucp_deepspeed.install()              # before the trainer is built; nothing else changes

From then on `DeepSpeedEngine.load_checkpoint`, which Hugging Face's Trainer, Accelerate and Lightning call, resumes
from a checkpoint of another data-parallel size or ZeRO stage, directly and proven by the digest of the state;
`save_checkpoint` writes DeepSpeed's own files and a `ucp.json` beside them, which says what is in them.

    installing.py       what is replaced, and put back by `uninstall()`
    replacing.py        how
    trainer.py          what Hugging Face's Trainer needs beside the engine's state
    engine_view.py      which engines are placed into here, and which are left to DeepSpeed
    loading.py          a checkpoint into a live engine
    saving.py           DeepSpeed's files with a ucp.json, committed by a rename
"""

from megatron.ucp_deepspeed.installing import install, uninstall

__all__ = ["install", "uninstall"]
