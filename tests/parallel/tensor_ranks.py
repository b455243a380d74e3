"""run_ranks for bodies that return tensors.

Pickled here, because multiprocessing's own pickler sends a tensor as a file descriptor that the parent would have to
fetch from a rank that has ended.

    from parallel.tensor_ranks import run_ranks
"""

import pickle

import torch.distributed as dist

from harness import ranks


def run_ranks(world_size, body, *args, timeout=120.0):
    results = ranks.run_ranks(world_size, _pickled, body, args, timeout=timeout)
    return [pickle.loads(result) for result in results]


def _pickled(rank, world_size, body, args):
    result = body(rank, world_size, *args)
    # A rank that ends while a peer is still connecting a group would look to it like a crash.
    dist.barrier()
    return pickle.dumps(result)
