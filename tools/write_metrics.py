"""Write docs/metrics.md from the registry: ``python tools/write_metrics.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

from ffnscope.io import write_text
from ffnscope.registry import METRICS, STATISTICS, cost_of

TARGET = Path(__file__).parents[1] / "docs" / "metrics.md"


def metrics_page() -> str:
    """Markdown page of all metrics and statistics."""
    lines = [
        "# Metrics",
        "",
        "Made by `python tools/write_metrics.py` from the docstrings; a test checks that it is current.",
        "",
        "A score says *high = keep*. Where a metric's natural value has the other sign, tables show the natural value.",
        "A metric of scope site sees one FFN at a time, one of scope model all of them as a graph.",
        "h [n, d_ff] is the channel activation (the input of the down projection), g its gradient, d(summed NLL)/dh.",
        "",
        "| metric | scope | cost | needs | natural sign | parameters | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in METRICS.names():
        rule = METRICS.get(name)
        sign = "high = keep" if rule.natural_sign > 0 else "low = keep"
        params = ", ".join(f"`{p}`" for p in rule.params.values()) or "–"
        needs = ", ".join(f"`{n}`" for n in rule.needed({})) or "weights only"
        lines.append(
            f"| [`{name}`](#{name}) | {rule.scope} | {cost_of(rule)} | {needs} | {sign} | {params} | {rule.source} |"
        )
    for name in METRICS.names():
        lines += ["", f"## {name}", "", inspect.getdoc(METRICS.get(name).fn) or ""]
    lines += ["", "# Statistics", "", "| statistic | reads | reduction | shape | what |", "|---|---|---|---|---|"]
    for name in STATISTICS.names():
        one = STATISTICS.get(name)
        every = f" (every {one.every}th token)" if one.every > 1 else ""
        shape = " x ".join(str(s) for s in one.shape)
        lines.append(f"| `{name}` | {', '.join(one.reads)}{every} | {one.reduce} | {shape} | {one.summary} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_text(TARGET, metrics_page())
