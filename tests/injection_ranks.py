"""Faults of a streamed run that two processes share: one of them is killed at a random file operation of its own."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from ffnscope.cli import main
from ffnscope.errors import ArtifactError
from injection import SERVER, Faults
from injection_files import Watch, watching
from injection_work import Work, another_model, another_text
from runs import small_run

SIZE = 2
PATIENCE = 60.0  # seconds that a process may take to see that another has died


class SharedRun(Work):
    """A streamed run as two processes, each of which keeps files of its own share of the calibration."""

    @property
    def is_run(self) -> bool:
        return True

    def prepare(self, texts: Path) -> None:
        super().prepare(texts)
        changes = {"evaluation": {"num_samples": 3}, "pruning": {"ratios": [0.5]}, "model": {"stream": "disk"}}
        config = small_run(self.root / "model", self.root / "texts", self.out, **changes)
        (self.root / "run.yaml").write_text(yaml.safe_dump(config))

    def start(self, *, overwrite: bool = False) -> str:
        ended, told = self.processes(overwrite=overwrite)
        if any(ended):
            raise ArtifactError(told)
        return told

    def processes(self, killed: tuple[int, int] | None = None, *, overwrite: bool = False) -> tuple[list[int], str]:
        """Do the work, with ``killed`` (rank, its file operation) until then: exit codes, and what they told."""
        arguments = ["run", str(self.root / "run.yaml"), *(["--overwrite"] if overwrite else [])]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ends = [killed[1] if killed and killed[0] == rank else None for rank in range(SIZE)]
        given = [(rank, port, str(self.root), ends[rank], arguments) for rank in range(SIZE)]
        running = [SERVER.Process(target=_process, args=one) for one in given]
        for one in running:
            one.start()
        if killed:
            running[killed[0]].join()
            end = time.monotonic() + PATIENCE  # as torchrun ends the others
            for one in running:
                one.join(max(0.1, end - time.monotonic()))
                one.kill()
        for one in running:
            one.join()
        return [one.exitcode for one in running], "\n".join(_told(self.root, rank).read_text() for rank in range(SIZE))

    def operations(self, rank: int) -> int:
        """File operations of a process of the last call that none was killed in."""
        return int((self.root / f"operations{rank}").read_text())


def _told(root: Path | str, rank: int) -> Path:
    return Path(root) / f"told{rank}"


def _process(rank: int, port: int, root: str, at: int | None, arguments: list[str]) -> None:
    """One of the processes, as torchrun starts it."""
    handle = os.open(_told(root, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    places = {"WORLD_SIZE": SIZE, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, COLUMNS="1000")
    sys.argv = ["ffnscope", *arguments]
    with watching(Watch(f"{root}/work", at, "kill")) as watch:
        try:
            main()
        finally:
            Path(f"{root}/operations{rank}").write_text(str(watch.count))


class SharedFaults(Faults):
    """Makes faults of a `SharedRun`."""

    work: SharedRun

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.work.fresh()
        self.work.start()
        self.whole = self.work.made()
        self.of_rank = [self.work.operations(rank) for rank in range(SIZE)]
        self.operations, self.seconds = self.of_rank[0], 0.0

    def broken_off(self, kind: str) -> str:
        """Kill one of the processes at a random file operation."""
        while True:
            self.work.fresh()
            rank = self.rng.randrange(SIZE)
            ended, told = self.work.processes((rank, self.rng.randint(1, self.of_rank[rank])))
            assert ended[rank] == -signal.SIGKILL, told
            assert all(ended), "the other process took the end of one for that of the work"
            if self.work.out.exists():
                return ""


def all_shared_faults(work: SharedRun, seed: int, *, kills: int = 6, times: int = 3) -> SharedFaults:
    """``kills``, ``times`` flipped bits and cut ends each, another model and text, and two runs in one folder."""
    made: Any = SharedFaults(work, seed)
    for _ in range(kills):
        made.stopped("kill -9 of one process")
    for kind in ("bit flipped", "truncated"):
        for _ in range(times):
            made.damaged(kind)
    made.changed("the model", another_model(work))
    made.changed("the calibration text", another_text(work))
    made.both()
    return made
