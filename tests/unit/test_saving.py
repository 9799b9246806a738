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
