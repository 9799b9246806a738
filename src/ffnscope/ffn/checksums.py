"""Checksums of checkpoints that ffnscope has written, in the headers of their safetensors.

A checksum stands in the file that it is of, so it comes and goes with it: `transformers` writes a header of its own
when it saves, so what a user has trained and saved again has none, and is not checked; nor is what others have made.
Readers of safetensors pass over metadata that they do not know.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ffnscope.errors import ModelError
from ffnscope.saving import replacing
from ffnscope.unchanged import while_unchanged

KEY = "ffnscope_crc32"
_CHUNK = 2**24


def add_checksum(path: Path) -> None:
    """Write the CRC-32 of a safetensors file, of its names, shapes and values, into its header.

    The file is written anew, since a header stands before the values.

    Raises:
        ArtifactError: it cannot be written.
    """
    with replacing(path) as part, path.open("rb") as file, part.open("wb") as made:
        header = _header(file)
        told = header.setdefault("__metadata__", {})
        told.pop(KEY, None)
        found = _start(header)
        told[KEY] = f"{0:08x}"
        text = _text(header)
        text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
        made.write(len(text).to_bytes(8, "little") + text)
        for chunk in _chunks(file):
            found = zlib.crc32(chunk, found)
            made.write(chunk)
        told[KEY] = f"{found:08x}"
        made.seek(8)
        made.write(_text(header))


def check_files(folder: Path) -> None:
    """Compare every safetensors of a folder that has a checksum with it, once per process as long as it stays.

    Raises:
        ModelError: a file is not what was written.
    """
    for path in sorted(folder.glob("*.safetensors")):
        _check(path)


@while_unchanged
def _check(path: Path) -> None:
    if not _is_intact(path):
        raise ModelError(
            f"{path} is damaged: its checksum is not the one that was written. Take an intact copy of the "
            f"checkpoint, or make it again. If a program changed the weights on purpose and kept {KEY!r} in the "
            "metadata of the file, save them without it, as save_pretrained does."
        )


def _is_intact(path: Path) -> bool:
    """Whether a file has the checksum that it tells, or tells none."""
    with path.open("rb") as file:
        try:
            header = _header(file)
            known = header["__metadata__"].pop(KEY)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
            return True  # safetensors refuses a damaged header
        found = _start(header)
        for chunk in _chunks(file):
            found = zlib.crc32(chunk, found)
    return known == f"{found:08x}"


def _header(file: IO[bytes]) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(min(length, 2**30)))


def _start(header: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


def _text(header: dict[str, Any]) -> bytes:
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk
