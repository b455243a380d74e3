"""A plain Hugging Face Trainer script over DeepSpeed: a small LLaMA learns Shakespeare and the King James Bible.

torchrun --nproc-per-node 2 train.py OUT --stage 2              # and again, with --resume, on whatever is left
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from megatron import ucp_deepspeed

ucp_deepspeed.install()  # the one line: all else is as it was without it

TOKENS = Path(__file__).resolve().parents[2] / "training_datasets" / "gpt2_text_document.bin"
SEQUENCE = 32


class Text(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.tokens = np.memmap(TOKENS, dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return 600

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self.tokens[index * SEQUENCE : (index + 1) * SEQUENCE].astype(np.int64))
        return {"input_ids": row, "labels": row}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--per-device", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    args = TrainingArguments(
        output_dir=options.out,
        per_device_train_batch_size=options.per_device,
        gradient_accumulation_steps=3,
        max_steps=60,
        save_steps=20,
        logging_steps=1,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        seed=1,
        report_to=[],
        disable_tqdm=True,
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": options.stage},
        },
    )
    torch.manual_seed(7 if options.resume else 1)  # what is resumed must not come from the seed
    config = LlamaConfig(
        vocab_size=50304,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    trainer = Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=Text())
    trainer.train(resume_from_checkpoint=options.resume)


if __name__ == "__main__":
    main()
