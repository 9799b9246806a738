"""Folders of one process: another process leaves them alone as long as it lives, and deletes them when it is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ffnscope.ffn.own_folder import OwnFolder

MAKES_ONE = """
import sys
from pathlib import Path
from ffnscope.ffn.own_folder import OwnFolder
found = OwnFolder(Path(sys.argv[1]), "states").path
(found / "state").write_text("large")
print(found, flush=True)
sys.stdin.read()
"""


def test_it_is_new_and_removed(tmp_path: Path) -> None:
    first, second = (OwnFolder(tmp_path / "parent", "states") for _ in range(2))
    assert first.path != second.path and first.path.is_dir() and second.path.is_dir()
    (first.path / "a").touch()
    for one in (first, second):
        one.remove()
        one.remove()  # nothing to do
    assert list((tmp_path / "parent").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked")
def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", MAKES_ONE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        left = Path(child.stdout.readline().strip())
        other = OwnFolder(tmp_path, "other")
        OwnFolder(tmp_path, "states").remove()
        assert (left / "state").exists()  # its process lives
        child.send_signal(signal.SIGKILL)
    mine = OwnFolder(tmp_path, "states")
    assert not left.exists() and other.path.exists() and mine.path.exists()
    other.remove()
