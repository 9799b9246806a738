"""FFNs with exact zeros: ReLU instead of SiLU or GELU, training with a growing L1 penalty, thresholds at the end."""
