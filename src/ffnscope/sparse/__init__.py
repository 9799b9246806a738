"""Contextual sparsity: which channels a token needs, and FFNs that read only those."""
