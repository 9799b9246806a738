"""Contextual sparsity: which channels one token needs, and FFNs that read only those."""
