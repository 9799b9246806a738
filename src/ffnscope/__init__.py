"""ffnscope: which FFN channels of a language model carry the loss, and how to remove the others."""

__version__ = "0.1.0"
