"""Start a script or a command as several processes that find each other, as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def started(size: int, arguments: Sequence[str], cwd: Path) -> list[tuple[int, str]]:
    """Run ``python ARGUMENTS`` as ``size`` processes to their end; status and output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    running = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    ended: list[tuple[int, str]] = []
    try:
        for one in running:
            output, _ = one.communicate(timeout=240)
            ended.append((one.returncode, output))
    finally:
        for one in running:
            one.kill()
    return ended
