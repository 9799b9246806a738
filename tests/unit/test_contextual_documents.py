"""Cells of benchmarks/contextual.py about documents, on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.tracing import trace
from reference import exact, text
from scripts import load_script

FOLDER = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="benchmarks are not part of a source distribution")


@pytest.fixture(scope="module")
def documents():
    sys.path.insert(0, str(FOLDER))
    try:
        return load_script(FOLDER / "contextual_documents.py")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    model, folder = exact("llama"), tmp_path_factory.mktemp("documents")
    return model, {name: trace(model, text(20, 16, seed), folder / name) for seed, name in enumerate("ab")}


def test_targets_are_measured_on_documents_that_were_not_calibrated_on(documents, traced):
    model, traces = traced
    found = documents.targets(model, "a", traces)
    rows = {(r["used_on"], r["rule"], r["target"], r["measure"]): r["documents"] for r in found["rows"]}
    assert len(rows) == 2 * 3 * 2 * 2 and found["calibrating"] == 4
    assert len(rows["a", "top_k", 0.9, "recall"]) == 16
    for rule in documents.RULES:
        low, high = (torch.tensor(rows["a", rule, t, "recall"]).mean() for t in (0.9, 0.95))
        assert 0.85 < low < high
        assert all(0 < d < 1 for d in rows["b", rule, 0.9, "density"])
    assert len(found["parameters"]["top_k 0.9"]) == 2


def test_missed_mass_of_documents_falls_with_density(documents, traced):
    model, traces = traced
    for measure in ("missed_mass", "recall"):
        losses = torch.tensor(documents.certificates(model, traces["a"], measure)["losses"])
        assert losses.shape == (len(documents.GRID), 20)
        assert bool((losses.diff(dim=0) <= 0).all()) and float(losses[0].min()) > 0.5 > float(losses[100].max())


def test_errors_of_documents_are_between_nothing_and_all(documents, traced):
    model, traces = traced
    found = documents.certificates(model, traces["a"], "relative_error")
    losses = torch.tensor(found["losses"])
    assert losses.shape == (len(found["grid"]), 20) == (len(documents.COARSE), 20)
    assert 0 <= float(losses.min()) < 0.1 < 0.5 < float(losses[0].min()) and float(losses.max()) <= 1


def test_rises_of_the_loss_of_documents(documents, traced):
    model, _ = traced
    windows, sites = text(6, 16, 0), find_sites(model)
    found = documents.losses(model, sites, windows)
    losses = torch.tensor(found["losses"])
    assert losses.shape == (len(documents.LOSS_GRID), 6)
    assert float(losses[0].abs().mean()) > float(losses[-1].abs().mean()) > 0
