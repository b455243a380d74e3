"""How far a run has come: the counters that a checkpoint carries from one topology to the next."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    iteration: int = 0
    """Optimizer steps asked for, those skipped on overflow included."""
    consumed_train_samples: int = 0
    """Samples of the training set used; the position in the data order."""
    consumed_valid_samples: int = 0
    consumed_train_tokens: int = 0
    skipped_iterations: int = 0
    """Steps that changed nothing because the gradient overflowed (fp16)."""
