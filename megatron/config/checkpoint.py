"""What is saved, and what a run starts from.

checkpoint = CheckpointConfig(save="run", load="run", save_interval=100, universal_checkpoint=True)
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.flag import flag


@dataclass(frozen=True)
class CheckpointConfig:
    """Every save can be resumed under every topology; there is no second format to ask for."""

    save: str | None = flag(None, help="run folder to save into")
    save_interval: int | None = flag(None, help="between saves", unit="iterations")
    async_save: bool = flag(False, help="write saves while training goes on, from a copy in host memory")
    async_save_max_gib: float | None = flag(
        None,
        help="host memory that a rank's copy may take, else training waits for the save; default: half of what is "
        "available on its host, shared by its ranks",
        unit="GiB",
    )
    exit_on_save_failure: bool = flag(
        False, help="stop when an --async-save fails, instead of trying again at the next --save-interval"
    )
    keep_last: int | None = flag(
        None, help="checkpoints that stay after each save, the newest ones; default: all", unit="checkpoints"
    )
    keep_every: int | None = flag(
        None, help="with --keep-last: the checkpoint of every so many iterations stays too", unit="iterations"
    )
    keep_newest_verified: bool = flag(
        False,
        help="with --keep-last: before a checkpoint is removed the newest is read back from the disk; where it is not "
        "what was saved it is marked damaged, and the newest that is stays. Without --async-save training waits for it",
    )
    export_hf_interval: int | None = flag(
        None,
        help="a multiple of --save-interval: such saves are exported as model folders of Hugging Face's into SAVE_hf/, "
        "by a process beside training. --keep-last must leave a save until it is exported",
        unit="iterations",
    )
    export_hf_like: str | None = flag(
        None,
        help="folder whose config.json and tokenizer the exports take over; default: the model folder that training "
        "started from, if any",
    )
    load: str | None = flag(
        None, help="run folder to resume from; with --finetune also a model folder of Hugging Face's"
    )
    pretrained_checkpoint: str | None = flag(
        None,
        help="weights to start from where --load holds no checkpoint yet: a model folder of Hugging Face's, a "
        "universal folder or a run folder",
    )
    exclude_frozen_parameters: bool = flag(
        False,
        help="saves leave out the weights that are not trained, and say by digest which they were; a run that goes on "
        "takes them from --pretrained-checkpoint",
    )
    use_checkpoint_args: bool = flag(
        False,
        help="the model's values that no flag gives are those of the checkpoint of --load, or of "
        "--pretrained-checkpoint: of its ucp.json, or of a config.json",
    )
    load_tag: str | None = flag(None, help="folder inside --load, such as global_step100; default: the latest")
    universal_checkpoint: bool = flag(False, help="resume from the universal folder that latest_universal names")
    finetune: bool = flag(False, help="load weights only; start at iteration 0")
    no_load_optim: bool = flag(False, help="do not load optimizer states")
    no_load_rng: bool = flag(False, help="do not load the state of the random streams")
    no_load_lr_state: bool = flag(False, help="do not load the schedule")
    load_strict: bool = flag(
        False,
        help="stop if latest in --load is lost, or what it names is damaged, instead of resuming from the newest whole "
        "checkpoint there",
    )
    exit_on_missing_checkpoint: bool = flag(False, help="stop if --load has no checkpoint, instead of starting afresh")
