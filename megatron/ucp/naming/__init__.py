"""What a model's parameters are called here and in other programs, and where their elements lie in each other.

gpt_model.py    the model that a checkpoint is of: its parameters' names and layouts here
names.py        what one table says of another program's names
tensors.py      each of its tensors: the place of its elements in ours
matching.py     are the tensors that are there those of a model?

The tables themselves are in huggingface/families.py and sources/megatron/names.py.
"""
