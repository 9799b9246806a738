"""From scores to pruning plans."""
