"""What docs/centrality.md shows runs, and its table of metrics is complete."""

from __future__ import annotations

import re
from pathlib import Path

import ffnscope
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.registry import METRICS
from ffnscope.testing import check_metric
from tiny import tiny, tokens

PAGE = (Path(__file__).parents[3] / "docs" / "centrality.md").read_text(encoding="utf-8")


def test_code_runs(monkeypatch):
    METRICS.names()
    monkeypatch.setattr(METRICS, "_items", dict(METRICS._items))
    windows = [contiguous_windows(tokens(4, 16, seed), "random tokens") for seed in (0, 1)]
    names = {
        "__name__": "page",
        "ffnscope": ffnscope,
        "model": tiny("llama"),
        "task_windows": windows[0],
        "other_windows": windows[1],
    }
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(code, "docs/centrality.md", "exec"), names)
    assert names["scores"].metric == "graph_cheirank"
    assert names["scores"].facts["params"]["teleport"] == "contrast"
    check_metric("write_strength")
    found = ffnscope.score(names["model"], ffnscope.find_sites(names["model"]), "write_strength")
    assert max(float(v.max()) for v in found.values.values()) == 1


def test_the_table_names_every_metric():
    rows = PAGE.split("## The metrics", 1)[1].split("\n\n", 2)[1]
    named = set(re.findall(r"`(graph_\w+)`", rows))
    assert named == {n for n in METRICS.names() if METRICS.get(n).family == "centrality"}
