"""Plots of the analyses of a run: concentration, halo against its nulls, dose-response, ablations, time and memory.

They take the rows of a run's tables, as `ffnscope.report.run_folder` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ffnscope.report.drawing import COLOURS, GREY, INK, PALE, STYLES, legend, need, new_figure, tidy
from ffnscope.report.inline_svg import tip
from ffnscope.report.tables import number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
POOLED = "all"
UNITS = {"bus_dimensions": "effective dimensions", "redundancy": "redundancy, nats"}
WIDE = 50.0  # values that spread further than this get a logarithmic axis
MOST_BARS = 40


def draw_lorenz(lorenz: Mapping[str, Any], metric: str, layers: Mapping[str, int], title: str = "") -> Figure:
    """Draw which share of a metric's mass the top channels hold: a thin line per FFN, a thick one for all together.

    Args:
        lorenz: ``fractions``, and ``curves``: metric -> site name -> share of the mass at each fraction.
        metric: one of these metrics.
        layers: site name -> layer, which sets the colour.
        title: second line of the heading.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter

    curves: Mapping[str, Sequence[float]] = lorenz["curves"].get(metric, {})
    need(curves, f"curves of {metric!r}")
    figure = new_figure(5.2, 4.0, f"{metric}: mass held by the top channels", title)
    axes = figure.add_subplot()
    shares = [100 * f for f in lorenz["fractions"]]
    deepest = max([layers.get(name, 0) for name in curves], default=0) or 1
    inner = {name: curve for name, curve in curves.items() if name != POOLED}
    for name, curve in inner.items():
        colour = colormaps["viridis"](0.2 + 0.7 * layers.get(name, 0) / deepest)
        axes.plot(shares, [100 * c for c in curve], color=colour, linewidth=0.8, alpha=0.8)
    if POOLED in curves:
        axes.plot(shares, [100 * c for c in curves[POOLED]], color=INK, linewidth=2)
    axes.plot(shares, shares, color=GREY, linewidth=1, linestyle="--")
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    axes.set_xticks([0, 1, 2, 5, 10, 20, 50, 100])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.grid(color=PALE, linewidth=0.5)
    axes.set_xlabel("top channels (linear up to 1 %)", color=INK, size=9)
    axes.set_ylabel("share of the mass", color=INK, size=9)
    tidy(axes)
    first, last = (colormaps["viridis"](x) for x in (0.2, 0.9))
    shown = {
        "all FFNs pooled": axes.plot([], [], color=INK, linewidth=2)[0],
        "first layer": axes.plot([], [], color=first)[0],
        "last layer": axes.plot([], [], color=last)[0],
        "all channels alike": axes.plot([], [], color=GREY, linestyle="--")[0],
    }
    legend(figure, shown)
    return figure


def draw_top_mass(rows: Rows, metric: str, title: str = "") -> Figure:
    """Draw the share of a metric's mass in the top 1, 5 and 10 % of the channels of each FFN, with 95 % intervals."""
    chosen = [r for r in rows if r["metric"] == metric and r["site"] != POOLED and r["top1"] is not None]
    need(chosen, f"concentration of {metric!r}")
    figure = new_figure(_wide(len(chosen)), 3.8, f"{metric}: mass in the top channels of each FFN", title)
    axes = figure.add_subplot()
    shown: dict[str, Any] = {}
    for key, what, colour in (
        ("top10", "top 10 %", COLOURS[5]),
        ("top5", "top 5 %", COLOURS[0]),
        ("top1", "top 1 %", COLOURS[1]),
    ):
        for at, row in enumerate(chosen):
            low, high = row[f"{key}_low"], row[f"{key}_high"]
            if low is not None and high is not None:
                axes.vlines(at, 100 * low, 100 * high, color=colour, linewidth=1.6, alpha=0.5)
            around = "" if low is None or high is None else f" (95 % interval {percent(low)} to {percent(high)})"
            tip(axes, at, 100 * row[key], f"{row['site']}: {what} of the channels hold {percent(row[key])}{around}")
        values = [100 * row[key] for row in chosen]
        shown[what] = axes.plot(range(len(chosen)), values, "o", color=colour, markersize=4)[0]
    axes.set_ylim(0, 102)
    axes.grid(axis="y", color=PALE, linewidth=0.5)
    axes.set_ylabel("share of the mass, %", color=INK, size=9)
    _site_ticks(axes, chosen)
    legend(figure, shown)
    return figure


def draw_halo(rows: Rows, halo: str, statistic: str = "redundancy", title: str = "") -> Figure:
    """Draw a statistic of a halo per FFN (redundancy with its core, or its excess over other channels'), and its nulls.

    Bars hold the middle 95 % of each matched null's draws.
    """
    asked = (halo, statistic)
    chosen = [
        r for r in rows if (r["halo"], r["statistic"]) == asked and r["site"] != POOLED and r["value"] is not None
    ]
    need(chosen, f"rows of the {halo} halo")
    nulls = list(dict.fromkeys(r["null"] for r in chosen))
    names = list(dict.fromkeys(r["site"] for r in chosen))
    sites = [next(r for r in chosen if r["site"] == name) for name in names]
    figure = new_figure(
        _wide(len(sites), 5.2, 0.2),
        4.0,
        f"{halo} halo: redundancy with the core" + ", less that of other channels" * (statistic == "excess"),
        title,
    )
    axes = figure.add_subplot()
    shown: dict[str, Any] = {}
    for index, null in enumerate(nulls):
        shift = 0.7 * ((index + 0.5) / len(nulls) - 0.5)
        for row in (r for r in chosen if r["null"] == null):
            at = names.index(row["site"]) + shift
            bar = axes.vlines(at, row["null_low"], row["null_high"], color=COLOURS[index], linewidth=2.4, alpha=0.7)
            shown.setdefault(f"null: {null.replace('_', ' ')}", bar)
            tip(
                axes,
                at,
                (row["null_low"] + row["null_high"]) / 2,
                f"{row['site']}, {null.replace('_', ' ')}: 95 % of {row['draws']} draws in "
                f"{number(row['null_low'])} to {number(row['null_high'])}; p {number(row['p_adjusted'])} corrected",
                width=0.7 / len(nulls),
                height=row["null_high"] - row["null_low"],
            )
    for at, row in enumerate(sites):
        line = axes.hlines(row["value"], at - 0.42, at + 0.42, color=INK, linewidth=1.6, zorder=4)
        shown.setdefault("the halo", line)
        tip(axes, at, row["value"], f"{row['site']}: {number(row['value'])} ({row['n_halo']} channels)")
    axes.set_ylabel(f"{statistic}, nats", color=INK, size=9)
    axes.grid(axis="y", color=PALE, linewidth=0.5)
    _site_ticks(axes, sites)
    legend(figure, shown)
    return figure


def draw_cross_layer(rows: Rows, statistic: str, title: str = "") -> Figure:
    """Draw one statistic of the core of each layer and the next, over the middle 95 % of random cores."""
    chosen = [r for r in rows if r["statistic"] == statistic and r["site"] != POOLED and r["value"] is not None]
    need(chosen, f"rows of {statistic!r}")
    figure = new_figure(_wide(len(chosen)), 3.4, f"Core across layers: {statistic.replace('_', ' ')}", title)
    axes = figure.add_subplot()
    shown: dict[str, Any] = {}
    for at, row in enumerate(chosen):
        if row["null_low"] is not None:
            bar = axes.vlines(at, row["null_low"], row["null_high"], color=COLOURS[5], linewidth=4, alpha=0.7)
            shown.setdefault("random cores, 95 %", bar)
        beside = "" if row["null_mean"] is None else f"; random cores {number(row['null_mean'])}"
        tip(axes, at, row["value"], f"{row['site']}: {number(row['value'])}{beside}")
    dots = axes.plot(range(len(chosen)), [r["value"] for r in chosen], "D", color=COLOURS[1], markersize=4)[0]
    shown["the core"] = dots
    axes.grid(axis="y", color=PALE, linewidth=0.5)
    axes.set_ylabel(UNITS.get(statistic, statistic), color=INK, size=9)
    ends = [v for r in chosen for v in (r["value"], r["null_low"], r["null_high"]) if v is not None]
    if min(ends) > 0 and max(ends) > WIDE * min(ends):
        axes.set_yscale("log")
    _site_ticks(axes, chosen)
    legend(figure, shown)
    return figure


def draw_dose(rows: Rows, title: str = "") -> Figure:
    """Draw the loss change of random masks against the share of the core that they hold: a dot per draw, their mean."""
    need(rows, "rows of the dose-response")
    figure = new_figure(5.0, 3.8, "Dose-response: random masks that hold a share of the core", title)
    axes = figure.add_subplot()
    shown: dict[str, Any] = {}
    for index, sparsity in enumerate(sorted({r["sparsity"] for r in rows})):
        colour, marker = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)][0]
        of = [r for r in rows if r["sparsity"] == sparsity]
        for row in of:
            at = 100 * row["core_share"]
            axes.errorbar(at, row["loss_change"], row["stderr"], fmt=marker, color=colour, markersize=3.5, alpha=0.6)
            tip(
                axes,
                at,
                row["loss_change"],
                f"{percent(row['core_share'])} of the core, draw {row['draw']}: "
                f"{number(row['loss_change'], row['stderr'])} nats/token",
            )
        shares = sorted({r["core_share"] for r in of})
        means = [_mean([r["loss_change"] for r in of if r["core_share"] == s]) for s in shares]
        curve = axes.plot([100 * s for s in shares], means, color=colour, linewidth=1.6)[0]
        shown[f"{percent(sparsity)} of the channels removed"] = curve
    axes.grid(color=PALE, linewidth=0.5)
    axes.set_xlabel("share of the core in the mask, %", color=INK, size=9)
    axes.set_ylabel("loss change, nats/token", color=INK, size=9)
    tidy(axes)
    legend(figure, shown)
    return figure


def draw_ablation(rows: Rows, title: str = "") -> Figure:
    """Draw the loss change when a set of channels is set to zero or to its mean, with its standard error."""
    need(rows, "rows of the ablation")
    chosen = [r for r in rows if r["site"] == POOLED] or list(rows)[:MOST_BARS]
    names = list(dict.fromkeys(f"{r['set'].replace('_', ' ')}, {r['n_channels']:,} channels" for r in chosen))
    figure = new_figure(6.2, 1.5 + 0.34 * len(names), "Ablation of sets of channels", title)
    axes = figure.add_subplot()
    shown: dict[str, Any] = {}
    for index, how in enumerate(dict.fromkeys(r["how"] for r in chosen)):
        for row in (r for r in chosen if r["how"] == how):
            name = f"{row['set'].replace('_', ' ')}, {row['n_channels']:,} channels"
            at = names.index(name) + (index - 0.5) * 0.22
            dot = axes.errorbar(
                row["loss_change"], at, xerr=row["stderr"], fmt=STYLES[index][0], color=COLOURS[index], markersize=5
            )
            shown.setdefault(f"set to {how}", dot)
            tip(axes, row["loss_change"], at, f"{name}, {how}: {number(row['loss_change'], row['stderr'])} nats/token")
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    axes.set_xlabel("loss change, nats/token", color=INK, size=9)
    tidy(axes)
    legend(figure, shown)
    return figure


def draw_stages(stages: Mapping[str, Mapping[str, Any]], title: str = "") -> Figure:
    """Draw how long each stage of a run took; the tip tells the peak memory."""
    need(stages, "stages")
    figure = new_figure(6.2, 1.3 + 0.26 * len(stages), "Time of the stages", title)
    axes = figure.add_subplot()
    for at, (name, one) in enumerate(stages.items()):
        axes.barh(at, one["seconds"], color=COLOURS[0], height=0.66)
        place: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "size": 8, "color": INK}
        most = max(one.get("peak_memory_bytes", {}).values(), default=0)
        told = f"{one['seconds']:,.1f} s" + f", {most / 2**30:.1f} GiB" * bool(most)
        axes.annotate(told, (one["seconds"], at), **place)
        memory = ", ".join(f"{v / 2**30:.1f} GiB {k}" for k, v in one.get("peak_memory_bytes", {}).items())
        tip(
            axes,
            one["seconds"] / 2,
            at,
            f"{name}: {one['seconds']:,.1f} s; peak so far {memory}",
            width=one["seconds"],
            height=0.66,
        )
    axes.set_yticks(range(len(stages)), list(stages), parse_math=False)
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max(one["seconds"] for one in stages.values()) or 1)
    axes.set_xlabel("seconds", color=INK, size=9)
    tidy(axes)
    return figure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _wide(n_sites: int, least: float = 4.8, each: float = 0.09) -> float:
    return min(max(3.0 + each * n_sites, least), 11.0)


def _site_ticks(axes: Axes, rows: Rows) -> None:
    """Layers as ticks, as many as can be read; sites of one layer stand beside each other."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(rows) <= 20 * s)
    axes.set_xticks(range(0, len(rows), step), [str(r["layer"]) for r in rows[::step]])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("layer", color=INK, size=9)
    tidy(axes)
