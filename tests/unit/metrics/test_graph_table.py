"""The table of invariances in docs/graph.md, measured on a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ffnscope as fs
from ffnscope.calibrate.windows import contiguous_windows
from tiny import D_FF, tiny, tokens

PAGE = (Path(__file__).parents[3] / "docs" / "graph.md").read_text(encoding="utf-8")
ROWS = [
    re.findall(r"`(\w+)`", line)[:1] + [cell.strip() for cell in line.split("|")[2:5]]
    for line in PAGE.split("| metric | up * c, down / c |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
]


def scores(model, name):
    text = contiguous_windows(tokens(4, 16), "random tokens")
    return torch.cat([*fs.score(model, fs.calibrate(model, text, [name]), name).values.values()]).view(-1, D_FF)


@torch.no_grad()
def changed(how):
    model = tiny("llama_relu", mlp_bias=True)
    c = torch.linspace(-3, 3, D_FF).exp2()
    for block in model.model.layers:
        if how == "units":
            block.mlp.up_proj.weight.mul_(c[:, None])
            block.mlp.up_proj.bias.mul_(c)
            block.mlp.down_proj.weight.div_(c)
        elif how == "down":
            block.mlp.down_proj.weight[:, 5] = 0
        elif how == "shut":
            block.mlp.gate_proj.bias[5] = -1000.0
    return model


def test_the_table_names_the_metrics_of_the_page():
    names = {row[0] for row in ROWS}
    assert names == {
        name for name in fs.METRICS.names() if fs.METRICS.get(name).family in ("pagerank", "layerwise")
    } | {
        "magnitude",
        "wanda",
        "random",
    }


@pytest.mark.parametrize(("name", "units", "down", "shut"), ROWS, ids=[row[0] for row in ROWS])
def test_the_table_is_true(name, units, down, shut):
    before = scores(changed(None), name)
    after = scores(changed("units"), name)
    assert units == ("same" if torch.allclose(before, after, rtol=1e-3) else "changes")
    assert down == ("0" if bool((scores(changed("down"), name)[:, 5] == 0).all()) else "not 0")
    assert shut == ("0" if bool((scores(changed("shut"), name)[:, 5] == 0).all()) else "not 0")
    assert bool((before > 0).all())
