"""Change a model by a plan: mask, slice, export."""
