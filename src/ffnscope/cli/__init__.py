"""The command line: thin wrappers of the public functions."""

from ffnscope.cli.app import app, main

__all__ = ["app", "main"]
