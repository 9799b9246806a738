"""How much main memory there is: of the process's control groups and the machine."""

from __future__ import annotations

from pathlib import Path


def main_memory(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that this process may use: the least of the machine's and of every control group it is in.

    None where the system does not tell (no ``/proc``). ``root`` holds ``proc`` and ``sys``.
    """
    try:
        rows = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines() if ":" in line)
    except OSError:
        return None
    return min([int(rows["MemTotal"].split()[0]) * 1024, *_group_limits(root)])


def _group_limits(root: Path) -> list[int]:
    """Limits of the groups of this process (v2 and v1) and of those that they are in; a container sees only its own."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        own = Path(path.lstrip("/"))
        for folder in (own, *own.parents):
            found += _limit(base / folder / name)
    return found


def _limit(path: Path) -> list[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []  # "max": there is none
