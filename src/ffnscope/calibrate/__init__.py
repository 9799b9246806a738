"""From text to channel statistics."""
