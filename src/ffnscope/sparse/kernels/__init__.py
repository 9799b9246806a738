"""Products with some rows of a matrix, for FFNs that read only the selected channels."""
