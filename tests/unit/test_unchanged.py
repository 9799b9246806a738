"""A function of a file that is called once, as long as the very same file stays as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ffnscope.unchanged import stamp, while_unchanged


class Reader:
    """Reads text, and notes how often; "bad" is refused."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, path: Path) -> str:
        self.times += 1
        text = path.read_text()
        if text == "bad":
            raise ValueError("damaged")
        return text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("one")
    return path


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def read(reader: Reader) -> Callable[[Path], str]:
    def read_text(path: Path) -> str:
        """Text of a file."""
        return reader(path)

    return while_unchanged(read_text)


def later(path: Path) -> None:
    """Let a file be changed a nanosecond after it was."""
    entry = path.stat()
    os.utime(path, ns=(entry.st_atime_ns, entry.st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """Put another file of equal size and time in its place."""
    entry, other = path.stat(), path.with_name("other")
    other.write_text("two")
    os.utime(other, ns=(entry.st_atime_ns, entry.st_mtime_ns))
    other.replace(path)


def grown(path: Path) -> None:
    """Write more, and set the time back."""
    entry = path.stat()
    path.write_text("three")
    os.utime(path, ns=(entry.st_atime_ns, entry.st_mtime_ns))


def test_it_is_read_once(
    file: Path, reader: Reader, read: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [read(file), read(file)] == ["one", "one"]
    monkeypatch.chdir(file.parent)
    assert read(Path("file")) == "one" and reader.times == 1
    assert read.__name__ == "read_text" and read.__doc__ == "Text of a file."


@pytest.mark.parametrize("change", [grown, later, replaced])
def test_a_changed_file_is_read_again(
    file: Path, reader: Reader, read: Callable[[Path], str], change: Callable[[Path], None]
) -> None:
    read(file)
    before = stamp(file)
    change(file)
    assert stamp(file) != before
    assert [read(file), read(file)] == [file.read_text()] * 2 and reader.times == 2


def test_what_fails_is_read_again(file: Path, reader: Reader, read: Callable[[Path], str]) -> None:
    file.write_text("bad")
    for times in (1, 2):
        with pytest.raises(ValueError, match="damaged"):
            read(file)
        assert reader.times == times


def test_nothing_is_remembered_as_none(tmp_path: Path) -> None:
    """Checks give nothing, and are remembered all the same."""
    times: list[Path] = []
    check = while_unchanged(times.append)
    (tmp_path / "file").write_text("one")
    for _ in range(2):
        check(tmp_path / "file")
    assert times == [tmp_path / "file"]


def test_a_missing_file_is_for_the_function_to_refuse(file: Path, reader: Reader, read: Callable[[Path], str]) -> None:
    read(file)
    file.unlink()
    assert stamp(file) is None
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            read(file)
    assert reader.times == 3


def test_a_file_that_changes_while_it_is_read_is_read_again(file: Path) -> None:
    seen: list[str] = []

    @while_unchanged
    def read(path: Path) -> str:
        seen.append(path.read_text())
        if len(seen) == 1:
            path.write_text("changed")
        return seen[-1]

    assert [read(file), read(file), read(file)] == ["one", "changed", "changed"] and len(seen) == 2


def test_functions_and_paths_are_apart(file: Path, reader: Reader, read: Callable[[Path], str]) -> None:
    other = Reader()
    read(file)
    assert while_unchanged(other.__call__)(file) == "one" and (reader.times, other.times) == (1, 1)
    another = file.with_name("another")
    another.write_text("else")
    assert read(another) == "else" and read(file) == "one" and reader.times == 2
