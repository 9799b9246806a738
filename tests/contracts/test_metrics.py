"""Every registered metric keeps the laws of metrics: a new one is tested by being registered."""

from __future__ import annotations

import pytest

from ffnscope.registry import METRICS, STATISTICS, cost_of
from ffnscope.rules import MARKS, ORDER
from ffnscope.testing import check_metric


@pytest.mark.parametrize("name", METRICS.names())
def test_metric_keeps_the_laws(name):
    check_metric(name)


@pytest.mark.parametrize("name", METRICS.names())
def test_metric_is_documented(name):
    rule = METRICS.get(name)
    assert rule.summary
    assert "[d_ff]" in (rule.fn.__doc__ or ""), "the docstring tells the shape"
    assert rule.source, "the docstring's claim has a source"
    assert rule.natural_sign in (1, -1)
    assert cost_of(rule) == "depends" if callable(rule.needs) else cost_of(rule) in ("weights", "forward", "backward")


@pytest.mark.parametrize("name", STATISTICS.names())
def test_statistic_is_documented(name):
    item = STATISTICS.get(name)
    assert item.summary
    assert set(item.reads) <= {*ORDER, *MARKS}
    assert item.reduce in ("sum", "max")
    assert item.every == 1 or not item.needs_gradient
