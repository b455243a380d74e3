"""Checkpoints of other Megatrons: Megatron-Core's `torch_dist`, and Megatron-DeepSpeed's, under our names.

names.py        their parameters' names and forms: the table
common_file.py  what a torch_dist folder has beside its tensors
groups.py       their parameter groups by our names
arguments.py    `args` in the checkpoint: the model, how far it was trained, its schedule
tensors.py      a torch_dist folder's tensors block by block, as a Source
buckets.py      optimizer states that lie in flat buckets (`dp_reshardable`): which parameter is where
core.py         a torch_dist folder as a Source with our names
deepspeed.py    a folder of Megatron-DeepSpeed's
"""
