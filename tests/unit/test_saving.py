"""A disk that is full while torch.save writes: told with the path, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffnscope.errors import ArtifactError
from ffnscope.saving import writing


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_told() -> None:
    told = r"cannot write /dev/full: torch.save failed .* Make room, and call again"
    with pytest.raises(ArtifactError, match=told), writing(Path("/dev/full")):
        torch.save(torch.zeros(1 << 20), "/dev/full")


def test_other_errors_stay() -> None:
    with pytest.raises(RuntimeError, match="shapes"), writing(Path("here")):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_what_cannot_be_read_meanwhile_is_not_called_written(tmp_path: Path, damage: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    dense = tmp_path / "dense.safetensors"
    save_file({"a": torch.zeros(8)}, dense)
    dense.write_bytes(dense.read_bytes()[:-7]) if damage == "cut" else dense.unlink()
    told = "while out was made, a safetensors file could not be read: (Error while des|No such file .*dense)"
    with pytest.raises(ArtifactError, match=told), writing(Path("out")), safe_open(dense, "pt"):
        pass


def test_what_safetensors_cannot_write_is_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "nowhere" / "out.safetensors"
    with pytest.raises(ArtifactError, match=r"cannot write .*out\.safetensors: Error while serializing"), writing(path):
        save_file({"a": torch.zeros(8)}, path)
