"""DeepSpeed's engine: built, put right where it is wrong, stepped, and its state described."""
