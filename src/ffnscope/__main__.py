"""``python -m ffnscope`` is the command ``ffnscope``."""

from ffnscope.cli import main

main()
