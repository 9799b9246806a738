"""Contextual sparsity: which channels matter for a token, and decoding that reads only these."""
