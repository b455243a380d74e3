"""Models of the Hugging Face hub and ours: which are the same, what each calls its parameters, where their elements
lie in each other, and what a config.json says in our words.

One table for an architecture (families.py) serves both directions: a folder is a Source (sources/huggingface.py), and
a Target (targets/huggingface.py).
"""
