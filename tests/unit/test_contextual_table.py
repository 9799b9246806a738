"""The page of benchmarks/contextual.py: certificates by hand and by simulation, lines from cells."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from scripts import load_script

GRID = [0.05, 0.1, 0.15]
PATH = Path(__file__).parents[2] / "benchmarks" / "contextual_table.py"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason="benchmarks are not part of a source distribution")


@pytest.fixture(scope="module")
def table():
    return load_script(PATH)


def falling(n_documents, seed):
    """Losses [400, n] that fall with density, and differ between documents."""
    scale = torch.rand(n_documents, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linspace(0.95, 0.05, 400, dtype=torch.float64)[:, None] ** 2 * (0.5 + scale / 2)


def test_the_lowest_safe_density_by_hand(table, monkeypatch):
    losses = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.1, 0.3, 0.2, 0.4], [0.0, 0.1, 0.1, 0.0]], dtype=torch.float64)
    monkeypatch.setattr(table.torch, "randperm", lambda n, generator: torch.arange(n))
    wrong, density = table.used(table.risk_control, losses, GRID, 0.5, 0)  # (0.4 + 1) / 3 is below
    assert (wrong, density) == (pytest.approx(0.3), pytest.approx(0.1))
    assert table.used(table.risk_control, losses, GRID, 0.35, 0) == (0.0, 1.0)  # even (0.1 + 1) / 3 is above
    monkeypatch.setattr(table, "ALPHA", 0.5)  # 2 of the 2 documents must be within
    assert table.used(table.conformal, losses, GRID, 0.3, 0) == (pytest.approx(0.5), pytest.approx(0.1))


def test_learn_then_test_is_judged_by_all_documents(table, monkeypatch):
    losses = torch.zeros(3, 80, dtype=torch.float64)
    losses[0, 40:] = 0.6  # the half that calibrates sees no loss
    monkeypatch.setattr(table.torch, "randperm", lambda n, generator: torch.arange(n))
    assert table.used(table.tested, losses, GRID, 0.25, 0) == (1.0, 0.05)
    assert table.used(table.tested, losses, GRID, 0.35, 0) == (0.0, 0.05)


@pytest.mark.parametrize("rule", ["risk_control", "conformal", "tested"])
def test_promises_hold_over_splits(table, rule):
    losses = falling(80, 0)
    limit, promised = 0.25, {"risk_control": 0.25, "conformal": 0.1, "tested": 0.1}[rule]
    certify = getattr(table, rule)
    found = [table.used(certify, losses, list(range(400)), limit, seed)[0] for seed in range(200)]
    wrong = torch.tensor(found, dtype=torch.float64)
    assert float(wrong.mean()) <= promised + 2 * float(wrong.std()) / math.sqrt(200)
    assert rule == "tested" or float(wrong.mean()) > 0.3 * promised  # not by keeping everything


def cell(row, ratio, density, share, **more):
    nll = [200 * math.log(20 * ratio), 100 * math.log(20 * ratio), 100 * math.log(20 * ratio) + (ratio - 1)]
    base = {"part": "perplexity", "row": row, "at": density or 1.0, "domain": "sotu", "windows": 3}
    return base | {"density": density, "bytes_share": share, "nll": nll, "targets": [200, 100, 100]} | more


def test_the_page(table, tmp_path, monkeypatch):
    path = tmp_path / "contextual.jsonl"
    cells = [
        cell("dense", 1.0, None, 1.0, documents=[0, 1, 2]),
        cell("oracle top-k", 1.05, 0.5, 0.83, documents=[0, 1, 2]),
        cell("4-bit dense FFN", 1.02, None, 0.28, documents=[0, 1, 2]),
        {
            "part": "certificates",
            "domain": "sotu",
            "layers": [0],
            "grid": list(range(400)),
            "losses": falling(60, 1).tolist(),
        },
        {
            **{"part": "certificates", "domain": "sotu", "layers": [0], "measure": "perplexity", "grid": [0.2, 0.8]},
            "losses": [[0.5] * 100, [0.01] * 100],
        },
        {
            **{"part": "targets", "domain": "sotu", "layers": [0], "calibrating": 9},
            "rows": [
                {"used_on": "sotu", "rule": "top_k", "target": 0.9, "measure": m, "documents": [0.9, 0.92, 0.88]}
                for m in ("recall", "density")
            ],
        },
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in cells))
    monkeypatch.setattr(table, "CELLS", path)
    monkeypatch.setattr(table, "SPLITS", 20)
    monkeypatch.setattr(table, "read", lambda part: [one for one in cells if one["part"] == part])
    table.write(tmp_path)
    page = (tmp_path / "contextual.md").read_text()
    assert "## sotu (in domain), 3 windows, dense 20.00" in page
    assert "| oracle top-k | 0.500 | 83.0 | 21.00 | +5.0 (" in page
    assert "| 4-bit dense FFN | – | 28.0 | 20.40 | +2.0 (" in page
    assert "| sotu (9) | sotu | 3 | top_k | 0.9 | 0.9000 (0.8503 to 0.9497) | yes | 0.900 |" in page
    assert "## Certificates, sotu, missed mass: 60 documents, 20 splits in halves" in page
    assert "| share of documents above 0.25 (split conformal) | 0.1 | " in page
    assert "## Certificates, sotu, rise of the perplexity: 100 documents" in page
    above = "share of splits with a mean over all documents above 0.1 (learn then test)"
    assert f"| {above} | 0.1 | 0.0000 | 0.0000 | yes | 0.800 |" in page  # a rise of 0.01 is within, one of 0.5 is not
    assert (tmp_path / "sotu_bytes_share.png").exists()
