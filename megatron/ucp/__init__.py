"""Universal Checkpointing: one library that reads, proves, converts and compares training states.

A training state is a set of atomic parameters; everything else (a rank's shard, a ZeRO partition, a
universal folder) is boxes of them. Sources read boxes, Targets write them, one planner joins the two. It needs numpy,
torch only where a file or a tensor is torch's own affair, no DeepSpeed and no process group.

    from megatron.ucp.sources import open_source
    from megatron.ucp.execute import read_into

    python -m megatron.ucp inspect checkpoints/global_step100
"""
