"""Numbers that describe scores: a summary per metric and site, and how far metrics agree on the order of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ffnscope.analyze.agreement import rank_correlations
from ffnscope.registry import METRICS
from ffnscope.types import Scores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ffnscope.types import FFNSite

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
Matrix = list[list[float | None]]


def natural_sign(metric: str) -> int:
    """Sign that turns a score (high = keep) into the natural value of its metric: 1 or -1.

    A metric that the registry does not know, such as scores made by hand, has its scores as natural values.
    """
    return METRICS.get(metric).natural_sign if metric in METRICS.names() else 1


def score_summary(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Describe the natural values (score times natural sign) of every metric and site, as plain JSON.

    Args:
        scores: metric name -> scores (site -> [d_ff]).

    Returns:
        ``{metric: {"natural_sign", "sites": {site name: {"layer", "d_ff", "mean", "std", "min", "max",
        "quantiles": {"0.01": ..., ..., "0.99": ...}}}}}``. The standard deviation divides by d_ff; quantiles are
        interpolated linearly. Every number is finite. A metric with experts that no calibration token reached lists
        their names under ``unreached``.
    """
    found: dict[str, Any] = {}
    for name, one in scores.items():
        sign = natural_sign(one.metric)
        sites = {site.name: _describe(site, as_array(value) * sign) for site, value in one.values.items()}
        found[name] = {"natural_sign": sign, "sites": sites}
        if "unreached" in one.facts:
            found[name]["unreached"] = one.facts["unreached"]
    return found


def correlation_summary(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Compare metrics pairwise by Spearman's rank correlation of their scores, as plain JSON.

    The correlation is computed inside each site (ties get their average rank), on scores, so that 1 means "the same
    channels first" whatever the natural signs. ``mean`` gives every site the same weight; ``min`` and ``max`` are the
    extreme sites. A site where either metric is constant, or which only one of them scored, has no correlation and is
    left out; a pair without any site left is None.

    Args:
        scores: metric name -> scores (site -> [d_ff]).

    Returns:
        ``{"names": [M], "mean": [M][M], "min": [M][M], "max": [M][M], "n_sites": [M][M]}``.
    """
    import numpy as np

    names = list(scores)
    size = (len(names), len(names))
    total, low, high = np.zeros(size), np.full(size, np.inf), np.full(size, -np.inf)
    n_sites = np.zeros(size, dtype=np.int64)
    for site in dict.fromkeys(site for one in scores.values() for site in one.values):
        found = _spearman([one.values.get(site) for one in scores.values()])
        defined = np.isfinite(found)
        total[defined] += found[defined]
        low, high = np.fmin(low, found), np.fmax(high, found)
        n_sites += defined
    mean = total / np.maximum(n_sites, 1)
    parts = {"mean": mean, "min": low, "max": high}
    return {"names": names, **{k: _blanked(v, n_sites) for k, v in parts.items()}, "n_sites": n_sites.tolist()}


def rank_correlation(scores: Mapping[str, Scores]) -> tuple[list[str], Matrix]:
    """Return the metric names and their mean rank correlations [M][M]; None = undefined (see `correlation_summary`)."""
    found = correlation_summary(scores)
    return found["names"], found["mean"]


def as_array(value: Tensor) -> NDArray[np.float64]:
    """Return a tensor of any dtype and device as a float64 array."""
    return value.detach().double().cpu().numpy()


def _describe(site: FFNSite, values: NDArray[np.float64]) -> dict[str, Any]:
    import numpy as np

    scale = float(np.abs(values).max()) or 1.0  # keeps squares of huge or tiny scores inside float64
    scaled = values / scale
    marks = np.quantile(values, QUANTILES)
    return {
        "layer": site.layer,
        "d_ff": site.d_ff,
        "mean": _plain(scaled.mean() * scale),
        "std": _plain(scaled.std() * scale),
        "min": _plain(values.min()),
        "max": _plain(values.max()),
        "quantiles": {f"{q:g}": _plain(mark) for q, mark in zip(QUANTILES, marks, strict=True)},
    }


def _plain(value: float) -> float:
    return float(value) + 0.0  # no negative zero


def _spearman(values: Sequence[Tensor | None]) -> NDArray[np.float64]:
    """Rank correlations [M, M] of M score vectors of one site; NaN for a missing or constant vector."""
    import numpy as np

    found = np.full((len(values), len(values)), np.nan)
    known = [i for i, value in enumerate(values) if value is not None]
    if known:
        found[np.ix_(known, known)] = rank_correlations([value for value in values if value is not None]).numpy()
    return found


def _blanked(matrix: NDArray[np.float64], n_sites: NDArray[np.int64]) -> Matrix:
    rows, counts = matrix.tolist(), n_sites.tolist()
    return [[v if n else None for v, n in zip(row, seen, strict=True)] for row, seen in zip(rows, counts, strict=True)]
