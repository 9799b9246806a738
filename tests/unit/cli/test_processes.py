"""``torchrun -m ffnscope run`` gives the results of one process, and only the first process writes and speaks."""

from __future__ import annotations

from pathlib import Path

import torch

from ffnscope.io import read_plan, read_scores
from processes import started

YAML = """
experiment: {{device: cpu}}
model: {{model_id: "{checkpoint}", dtype: float64}}
dataset: {{name: "{texts}/train.txt", batch_size: 2}}
calibration: {{num_samples: 6, max_length: 32, batch_size: 2}}
pruning: {{enabled: true, ratios: [0.5], algorithms: [scar_loss_proxy]}}
evaluation: {{name: "{texts}/test.txt", num_samples: 4}}
output: {{dir: "{out}", plots: false, report: false}}
"""


def test_a_run_as_two_processes_is_that_of_one(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    folders: list[Path] = []
    for size in (1, 2):
        folders.append(tmp_path / f"out{size}")
        config = tmp_path / f"{size}.yaml"
        config.write_text(YAML.format(checkpoint=checkpoint, texts=texts, out=folders[-1]))
        ended = started(size, ["-m", "ffnscope", "run", str(config)], tmp_path)
        assert [status for status, _ in ended] == [0] * size, ended
    assert "2 processes share the windows of every pass." in ended[0][1]
    assert ended[1][1] == "" or "Gloo" in ended[1][1]
    one, two = (read_scores(folder / "scores.safetensors")[0]["scar_loss_proxy"].values for folder in folders)
    for site, value in one.items():
        assert torch.allclose(two[site], value, rtol=1e-9, atol=0)
    (name,) = (path.name for path in (folders[0] / "plans").glob("*.json"))
    plans = [read_plan(folder / "plans" / name) for folder in folders]
    assert all(torch.equal(plans[1].kept[site], index) for site, index in plans[0].kept.items())
    files = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in folders]
    assert files[0] == files[1]
