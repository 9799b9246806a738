"""The memory of the machine, from files as Linux has them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ffnscope.ffn.main_memory import main_memory
from ffnscope.run.machine import device_memory, library_bytes
from ffnscope.run.progress import peak_memory


def system(root: Path, groups: str, limits: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:     1000 kB\nMemFree:      10 kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, value in limits.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
    return root


def test_the_machine_without_a_limit(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/a\n", {"a/memory.max": "max\n"})
    assert main_memory(root) == 1000 * 1024


def test_the_least_limit_of_all_groups_above(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/a/b\n", {"a/b/memory.max": "900000\n", "a/memory.max": "500000\n"})
    assert main_memory(root) == 500000


def test_a_container_sees_its_limit_at_the_root(tmp_path: Path) -> None:
    assert main_memory(system(tmp_path, "0::/elsewhere\n", {"memory.max": "400000\n"})) == 400000


def test_version_one(tmp_path: Path) -> None:
    limits = {"memory/a/memory.limit_in_bytes": "300000\n", "memory/memory.limit_in_bytes": str(2**63 - 4096)}
    root = system(tmp_path, "5:cpu:/x\n4:memory:/a\n", limits)
    assert main_memory(root) == 300000


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert main_memory(tmp_path) is None
    assert device_memory(torch.device("cpu")) is None
    found = main_memory()
    assert found is None or found > 2**27


def test_libraries_are_what_the_process_takes_now(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tpython\nVmHWM:\t  900 kB\nVmRSS:\t  300 kB\n")
    assert library_bytes(tmp_path) == 300 * 1024
    assert "transformers.models.llama.modeling_llama" in sys.modules  # what models of all kinds import


def test_libraries_by_the_peak_where_the_system_tells_only_that(tmp_path: Path) -> None:
    assert library_bytes(tmp_path) == peak_memory()["resident"]
