"""PyTorch's distributed checkpoints (torch.distributed.checkpoint, DCP): what FSDP2 and TorchTitan programs save.

metadata.py    what the folder holds and where each chunk lies: `.metadata`, read without running any of it
files.py       what the places hold
source.py      the folder as a Source: model and optimizer by the parameters' own names
"""
