"""One run: how much, how often, on what, and what it says.

run = RunConfig(micro_batch_size=2, global_batch_size=8, train_iters=200)
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.flag import flag


@dataclass(frozen=True)
class RunConfig:
    """Iterations are optimizer steps, one global batch each; samples are sequences."""

    micro_batch_size: int = flag(help="sequences that one rank computes at a time", unit="samples")
    global_batch_size: int | None = flag(
        None, help="sequences of one optimizer step; default: micro batch x data parallel size", unit="samples"
    )
    rampup_batch_size: tuple[int, ...] | None = flag(
        None,
        help="START INCREMENT SAMPLES: from START in steps of INCREMENT to --global-batch-size, over the first SAMPLES",
        unit="samples",
    )
    train_iters: int | None = flag(None, help="length of the run", unit="iterations")
    train_samples: int | None = flag(None, help="length of the run", unit="samples")
    train_tokens: int | None = flag(None, help="length of the run, beside one of the others", unit="tokens")
    seed: int = flag(1234, help="of initial weights, dropout and the order of samples")
    log_interval: int = flag(100, help="between console lines", unit="iterations")
    eval_interval: int = flag(1000, help="between evaluations", unit="iterations")
    eval_iters: int = flag(100, help="global batches of one evaluation; 0 is none", unit="iterations")
    exit_interval: int | None = flag(
        None, help="save and stop at the first iteration divisible by this", unit="iterations"
    )
    exit_duration_in_mins: int | None = flag(None, help="save and stop after this long", unit="minutes")
    verify_state_every: int | None = flag(
        None,
        help="after so many steps: weights and moments must still be what the step left when the next begins",
        unit="iterations",
    )
    go_back_on_state_change: bool = flag(
        False,
        help="with --verify-state-every: where something has changed, go on from the newest whole checkpoint in --save "
        "instead of stopping",
    )
    exit_signal_handler: bool = flag(False, help="save and stop on --exit-signal")
    exit_signal: str = flag(
        "SIGTERM",
        help="that --exit-signal-handler waits for, sent to a launcher, to one rank or to all processes",
        choices=("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"),
    )
    exit_signal_grace: int | None = flag(
        None,
        help="after --exit-signal: a run that has not saved and ended by then is stopped where it stands, with exit "
        "code 143; earlier checkpoints stay",
        unit="seconds",
    )
    tensorboard_dir: str | None = flag(None, help="folder of TensorBoard events and run.json")
    tensorboard_queue_size: int = flag(1000, help="events kept before they are written", unit="events")
    deepspeed: bool = flag(False, help="as upstream; the engine is DeepSpeed's with or without it")
    deepspeed_config: str | None = flag(
        None, "--deepspeed_config", "--deepspeed-config", help="DeepSpeed's JSON, merged with these flags"
    )
    fused_kernels: str = flag(
        "auto",
        help="of norms, activations, rotary positions, masked softmax, cross entropy and Adam; auto: on CUDA the "
        "fastest that can be imported, on a CPU torch",
        choices=("auto", "apex", "triton", "torch"),
    )
    profile: tuple[str, ...] | None = flag(
        None,
        help="write a trace of torch's profiler to --tensorboard-dir (or here); pt-full: with shapes, memory and "
        "stacks",
        choices=("pt", "pt-full"),
        may_be_bare=True,
    )
    profile_steps: str = flag(
        "2,3", "--profile_steps", "--profile-steps", help="FIRST,LAST that are in the trace", unit="iterations"
    )
    profile_ranks: tuple[int, ...] = flag((0,), help="that write one each", unit="ranks")
    torch_compile: bool = flag(
        False, help="compile each transformer block with torch.compile; the first step then takes a minute or more"
    )
    distributed_backend: str = flag(
        "nccl", help="of torch.distributed; without CUDA nccl becomes gloo", choices=("nccl", "gloo", "ccl", "hccl")
    )
    distributed_timeout_minutes: int = flag(10, help="of collectives", unit="minutes")
    local_rank: int | None = flag(None, "--local-rank", "--local_rank", help="set by the launcher")

    @property
    def profiled_steps(self) -> tuple[int, int]:
        """(first, last). Raises ValueError for what is not two numbers."""
        first, last = (int(word) for word in self.profile_steps.split(","))
        return first, last
