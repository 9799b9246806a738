"""What a run found, in plain sentences with their numbers, and what these numbers do not say."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ffnscope.analyze.concentration import LOSS_PROXY
from ffnscope.analyze.halo import ENOUGH
from ffnscope.analyze.nulls import SIGNIFICANT
from ffnscope.evaluate.compare import EvalRow
from ffnscope.report.run_folder import RunFolder
from ffnscope.report.tables import FLOOR, number, percent, result

MUCH = 0.25  # share of its own channels beyond which a null has little power
MOST_NAMED = 3  # of what an analysis leaves out
ACROSS = {
    "bus_dimensions": "The core writes to {} effective residual dimensions",
    "drive": "The core drives what the next FFN reads by {}",
}
FEW_TOKENS = 4  # tokens per channel under which second moments of the channels are under-determined


def findings(run: RunFolder) -> list[str]:
    """Sentences about what was found; one that has no numbers behind it is left out."""
    made = (
        *(_quality, _concentration, _core, _stability, _halo, _across, _protection, _ablation, _dose, _ranking),
        _tasks,
    )
    return [sentence for make in made for sentence in make(run)]


def caveats(run: RunFolder) -> list[str]:
    """Sentences about what limits these numbers."""
    return [
        sentence
        for make in (_calibration, _few_tokens, _overlap, _left_out, _evaluation, _intervals)
        for sentence in make(run)
    ]


def _quality(run: RunFolder) -> Iterator[str]:
    for dense in run.dense:
        found = result(dense, "perplexity")
        if found is None:
            continue
        yield f"The unpruned model has perplexity {number(found.value, found.stderr)} on {dense.dataset}."
        pruned = [r for r in run.rows if r.dataset == dense.dataset and r.metric is not None]
        for sparsity in sorted({r.sparsity_asked for r in pruned}):
            yield from _best_at(sparsity, [r for r in pruned if r.sparsity_asked == sparsity], found.value)


def _best_at(sparsity: float, rows: Sequence[EvalRow], dense: float) -> Iterator[str]:
    values = {r.metric: one.value for r in rows if (one := result(r, "perplexity"))}
    ranked = {name: value for name, value in values.items() if name != FLOOR}
    if not ranked:
        return
    best = min(ranked, key=ranked.__getitem__)
    among = f", the lowest of {len(ranked)} metrics" if len(ranked) > 1 else ""
    floor = f"; channels removed at random give {number(values[FLOOR])}" if FLOOR in values else ""
    yield (
        f"With {percent(sparsity)} of the channels removed by {best} it is {number(ranked[best])}{among} "
        f"({ranked[best] / dense:.2f} times the unpruned one){floor}."
    )


def _concentration(run: RunFolder) -> Iterator[str]:
    medians: Mapping[str, Any] = run.facts.get("concentration", {}).get("medians", {})
    if LOSS_PROXY in medians:
        yield medians[LOSS_PROXY]["sentence"]


def _core(run: RunFolder) -> Iterator[str]:
    rows = [r for r in run.tables.get("core_overlap", ()) if r["other"] == "activation_outliers" and r["site"] != "all"]
    if not rows:
        return
    shared = statistics.median(r["shared"] / r["n_core"] for r in rows)
    chance = statistics.median(r["expected"] / r["n_core"] for r in rows)
    more = sum(is_significant(r) for r in rows)
    yield (
        f"{percent(shared)} of the core are activation outliers too (median over FFNs; {percent(chance)} would be by "
        f"chance); in {more} of {len(rows)} FFNs that is more than chance (p < {SIGNIFICANT:g}, corrected)."
    )


def _halo(run: RunFolder) -> Iterator[str]:
    rows = [r for r in run.tables.get("halo", ()) if r["statistic"] == "redundancy" and r["p"] is not None]
    for halo in dict.fromkeys(r["halo"] for r in rows):
        of = [r for r in rows if r["halo"] == halo]
        whole = [r for r in of if r["site"] == "all"]
        if not whole:
            continue
        nulls = ", ".join(f"{r['null'].replace('_', ' ')} {number(r['null_mean'])} (p {number(r['p'])})" for r in whole)
        yield (
            f"The {halo} halo shares {number(whole[0]['value'])} nats with the core per channel, mean over FFNs; its "
            f"nulls share: {nulls}. {_single(of)}"
        )


def _stability(run: RunFolder) -> Iterator[str]:
    for row in run.tables.get("core_stability", ()):
        if row["site"] == "all":
            halves = row["compared"] == "halves"
            which = "cores of two halves of the documents" if halves else f"core and that of {row['compared']}"
            yield f"The {which} have a Jaccard overlap of {row['jaccard']:.2f} (median over FFNs)."


def _across(run: RunFolder) -> Iterator[str]:
    for row in run.tables.get("cross_layer", ()):
        if row["site"] == "all" and row["statistic"] in ACROSS:
            yield (
                f"{ACROSS[row['statistic']].format(number(row['value']))}, mean over FFNs; random cores of its size: "
                f"{number(row['null_mean'])} (p {number(row['p'])})."
            )


def _ablation(run: RunFolder) -> Iterator[str]:
    rows = [r for r in run.tables.get("ablation", ()) if r["how"] == "zero"]
    core = next((r for r in rows if r["set"] == "core"), None)
    if core is None:
        return
    others: list[str] = []
    for name in ("write_halo", "lp_matched", "random"):
        of = [r for r in rows if r["set"] == name]
        if of:
            mean = statistics.mean(r["loss_change"] for r in of)
            others.append(f"{name.replace('_', ' ')} ({of[0]['n_channels']:,} channels) {number(mean)}")
    yield (
        f"Without the {core['n_channels']:,} channels of the core the loss rises by "
        f"{number(core['loss_change'], core['stderr'])} nats/token"
        + (f"; without {', '.join(others)}" if others else "")
        + "."
    )


def _single(rows: Sequence[Mapping[str, Any]]) -> str:
    """In how many FFNs a halo stands out by itself."""
    sites = [r for r in rows if r["site"] != "all"]
    counts: list[str] = []
    for null in dict.fromkeys(r["null"] for r in sites):
        of = [r for r in sites if r["null"] == null]
        if min(r["draws"] for r in of) + 1 < len(of) / SIGNIFICANT:
            return "There are too few draws to tell single FFNs."
        counts.append(f"{sum(map(is_significant, of))} of {len(of)} ({null.replace('_', ' ')})")
    return f"More than its null, corrected for their number, is that of {', '.join(counts)} FFNs."


def is_significant(row: Mapping[str, Any]) -> bool:
    """Whether a row of an analysis differs from its null, corrected for the number of FFNs."""
    return row["p_adjusted"] is not None and row["p_adjusted"] < SIGNIFICANT


def _dose(run: RunFolder) -> Iterator[str]:
    rows = run.tables.get("dose", ())
    by_share = {s: [r["loss_change"] for r in rows if r["core_share"] == s] for s in {r["core_share"] for r in rows}}
    if len(by_share) > 1:
        least, most = (statistics.mean(by_share[f(by_share)]) for f in (min, max))
        yield (
            f"Random masks that hold {percent(min(by_share))} of the core cost {number(least)} nats/token more than "
            f"the unpruned model, those with {percent(max(by_share))} of it {number(most)}."
        )


def _ranking(run: RunFolder) -> Iterator[str]:
    every = [r for r in run.tables.get("ranking_quality", ()) if r["metric"] in run.scores or r["metric"] == FLOOR]
    rows = [r for r in every if r["spearman_token"] is not None]
    if rows:
        best = max(rows, key=lambda r: r["spearman_token"])
        yield (
            f"Of {len(rows)} metrics, {best['metric']} ranks the sampled channels most like the measured change of the "
            f"tokens' losses (Spearman {best['spearman_token']:.2f})."
        )


def _tasks(run: RunFolder) -> Iterator[str]:
    tasks = dict.fromkeys(row["task"] for row in run.tasks)
    if tasks:
        names = ", ".join(tasks)
        yield f"{len(tasks)} downstream task{'s' * (len(tasks) > 1)} ran on every model ({names}); see their table."


def _protection(run: RunFolder) -> Iterator[str]:
    for row in run.tables.get("protection", ()):
        change, stderr = row["loss_difference"], row["stderr"]
        unclear = stderr is None or abs(change) < 2 * stderr
        yield (
            f"With {percent(row['sparsity'])} removed, the loss of {row['first']} is {number(abs(change), stderr)} "
            f"nats/token {'below' if change < 0 else 'above'} that of {row['second']} on {row['dataset']}"
            f"{', within the error' if unclear else ''}."
        )


def _calibration(run: RunFolder) -> Iterator[str]:
    text = run.summary["texts"]["calibration"]
    yield (
        f"Scores come from {text['tokens']:,} tokens of {text['text']}; another text, or more of it, may rank channels "
        "otherwise (ffnscope score --repeats measures by how much)."
    )
    widest = max((site["d_ff"] for site in run.summary["model"]["sites"]), default=0)
    if text["tokens"] < FEW_TOKENS * widest:
        yield (
            f"{text['tokens']:,} tokens are fewer than {FEW_TOKENS} per channel of the widest FFN ({widest:,}): what "
            "needs second moments between channels is under-determined."
        )


def _few_tokens(run: RunFolder) -> Iterator[str]:
    few: Mapping[str, int] = run.facts.get("halo", {}).get("few_tokens", {})
    if few:
        yield (
            f"Correlations with the core of {len(few)} FFNs rest on fewer than {ENOUGH} tokens per core channel (the "
            f"fewest: {min(few.values()):,}), which do not determine them: do not rely on their halos."
        )


def _overlap(run: RunFolder) -> Iterator[str]:
    """Nulls whose sets are largely what they are compared with."""
    rows = [r for r in run.tables.get("halo", ()) if r["site"] == "all" and r["statistic"] == "redundancy"]
    for row in rows:
        shared = row.get("null_overlap") or 0.0
        if shared > MUCH:
            own, null = "halo" if row["null"] == "lp_matched" else "core", row["null"].replace("_", " ").capitalize()
            yield (
                f"{null} sets for the {row['halo']} halo hold {100 * shared:.0f} % of the {own}'s own channels, "
                "because few others are like them: a large p says little there."
            )


def _left_out(run: RunFolder) -> Iterator[str]:
    """What has no number, with the reason: one sentence per analysis and reason."""
    for name in ("concentration", "core_overlap", "halo", "cross_layer"):
        refused: Mapping[str, str] = run.facts.get(name, {}).get("refused", {})
        for reason in dict.fromkeys(refused.values()):
            of = [what for what, why in refused.items() if why == reason]
            shown = ", ".join(of[:MOST_NAMED]) + (f" and {len(of) - MOST_NAMED} more" if len(of) > MOST_NAMED else "")
            yield f"{name.replace('_', ' ').capitalize()} leaves out {shown}: {reason}."


def _evaluation(run: RunFolder) -> Iterator[str]:
    if not run.rows:
        yield "Nothing was evaluated on held-out text."
        return
    tokens = {row.dataset: one.n for row in run.rows if (one := result(row, "perplexity"))}
    yield "Perplexities are of " + " and ".join(f"{n:,} tokens of {name}" for name, n in tokens.items()) + "."


def _intervals(run: RunFolder) -> Iterator[str]:
    if run.rows:
        yield "± is one standard error over windows of the text: two rows of one text differ by less noise than that."
