"""Fused kernels where the machine has them, plain torch elsewhere: one function per operation (see kernels.py)."""
