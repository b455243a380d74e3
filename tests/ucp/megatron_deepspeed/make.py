"""Makes the sample checkpoints in this folder with Megatron-DeepSpeed, on a CPU. See README.md beside it.

torchrun --nproc-per-node 2 make.py OUT FLAGS...

Runs its pretrain() with FLAGS on samples that a test can make again, saves after three steps, trains three more, and
writes all losses and gradient norms to OUT/losses.json.
"""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import torch

SEQ, BATCH, VOCAB, STEPS, MORE = 8, 4, 29, 3, 3


def stand_in(name, **values):
    """For a module that pretrain() imports, and that this does not need."""
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(values)
    sys.modules[name] = module


stand_in("megatron.model.vision.knn_monitor", compute_feature_bank=None)  # wants torchvision
stand_in("deepspeed.compression")  # gone from DeepSpeed
stand_in("deepspeed.compression.compress", init_compression=None, redundancy_clean=None)
_view = torch.Tensor.view


def _view_or_copy(self, *shape, **kwargs):
    """Views that attention takes of what is contiguous on a GPU only."""
    try:
        return _view(self, *shape, **kwargs)
    except RuntimeError:
        return self.reshape(*shape)


torch.Tensor.view = _view_or_copy

from deepspeed.accelerator import get_accelerator  # noqa: E402

get_accelerator().device_count = lambda: int(os.environ["WORLD_SIZE"])

import pretrain_gpt  # noqa: E402
from megatron import optimizer, training  # noqa: E402


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        """Batches come in turn: two are learned by heart."""
        generator = torch.Generator().manual_seed(1000 + index % (2 * BATCH))
        return {"text": torch.randint(0, VOCAB, (SEQ + 1,), generator=generator).numpy()}


def main():
    out, *flags = sys.argv[1:]
    values = {
        "num-layers": 2, "hidden-size": 16, "num-attention-heads": 4, "seq-length": SEQ,
        "max-position-embeddings": SEQ, "global-batch-size": BATCH, "train-iters": STEPS + MORE, "lr": 0.02,
        "min-lr": 0.002, "lr-decay-style": "cosine", "lr-decay-iters": 16, "lr-warmup-iters": 2, "weight-decay": 0.1,
        "clip-grad": 1.0, "adam-beta2": 0.95, "hidden-dropout": 0, "attention-dropout": 0,
        "tokenizer-type": "NullTokenizer", "vocab-size": 31, "make-vocab-size-divisible-by": 8,
        "data-path": "none", "log-interval": 1, "eval-iters": 0, "eval-interval": 1000, "save": out,
        "save-interval": STEPS, "num-workers": 0, "distributed-backend": "gloo",
        "local_rank": os.environ["LOCAL_RANK"],
    }  # fmt: skip
    line = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    line += ["--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion", "--no-bias-dropout-fusion"]
    sys.argv = ["pretrain_gpt.py", *line, "--deepspeed", *flags]
    found = []
    step = training.train_step

    def recorded(*args, **kwargs):
        result = step(*args, **kwargs)
        engine = args[2][0]
        norm = result[2] or engine.get_global_grad_norm() or float("nan")
        found.append([float(result[0]["lm loss"]), float(norm)])
        return result

    training.train_step = recorded
    optimizer.Adam = torch.optim.AdamW  # apex's FusedAdam, which it takes on a GPU, decouples weight decay too
    pretrain_gpt.train_valid_test_datasets_provider = lambda counts: (Samples(), Samples(), Samples())
    training.pretrain(
        pretrain_gpt.train_valid_test_datasets_provider,
        pretrain_gpt.model_provider,
        training.ModelType.encoder_or_decoder,
        pretrain_gpt.forward_step,
        args_defaults={"tokenizer_type": "NullTokenizer"},
        data_post_process=pretrain_gpt.data_post_process,
    )
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        run = Path(out)
        shutil.rmtree(run / f"global_step{STEPS + MORE}")
        (run / "latest").write_text(f"global_step{STEPS}")
        (run / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
        for path in run.glob("*.py"):
            path.unlink()
        (run / "losses.json").write_text(json.dumps({"before": found[:STEPS], "after": found[STEPS:]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
