"""Measure what a change cost."""
