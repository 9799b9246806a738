"""What scores and statistics say about a model, with how sure one can be."""
