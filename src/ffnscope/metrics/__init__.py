"""Metrics: pure functions of statistics and weights, grouped by the signal they read."""
