"""The GPT, plain and as pipeline stages, from the same blocks and with the same canonical parameter names."""
