"""Questions about a run that is not started: what it would need, and where it would fit.

estimate = EstimateConfig(estimate=True, gpus=64, gpu_memory=80)
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.flag import flag


@dataclass(frozen=True)
class EstimateConfig:
    """Without `estimate` only `peak_tflops` matters."""

    estimate: bool = flag(
        False,
        help="say what memory each rank would need, stage by stage, and end; with --gpu-memory which topologies fit",
    )
    gpus: int | None = flag(
        None, help="with --estimate: the run on so many GPUs; default: on CPUs, as many as this is started on"
    )
    gpu_memory: float | None = flag(
        None, help="with --estimate and --gpus: list the topologies that fit into so much, best first", unit="GB"
    )
    gpus_per_node: int = flag(8, help="with --estimate: GPUs that a fast link connects")
    node_bandwidth: float = flag(300.0, help="with --estimate: of that link, for one GPU", unit="GB/s")
    network_bandwidth: float = flag(25.0, help="with --estimate: between nodes, for one GPU", unit="GB/s")
    peak_tflops: float | None = flag(
        None,
        help="of one device in the run's precision, for model FLOP/s utilisation (MFU); default: that of the card, if "
        "it is a known one",
        unit="TFLOP/s",
    )
