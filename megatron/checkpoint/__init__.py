"""Checkpoints of a live run: saved, found, judged and loaded. The files themselves are megatron.ucp's."""
