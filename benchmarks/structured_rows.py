"""Rows of benchmarks/structured.py: how each of them turns the dense model and one calibration into a pruned model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ffnscope
from ffnscope.analyze.levels import calibrate_all
from ffnscope.analyze.measured import CurveRounds
from ffnscope.apply.method import Method
from ffnscope.apply.pruned import Pruned
from ffnscope.types import Budget

ELEMENTS = "llm_pruner_elements"
OUTPUT_GRADIENT_WINDOWS = 32
"""Windows whose gradients of the FFN outputs weigh the errors of obs_loss; 128 change little (docs/log.md)."""
ONE_SHOT = " + one-shot"
SCORES = {
    "random": "random",
    "magnitude (product of norms)": "magnitude",
    "OptiPFair PPM": "peak_to_peak",
    "LLM-Rank WPR": "layerwise_weighted_pagerank",
    "LLM-Rank MPR": "layerwise_modified_pagerank",
    "activation norm": "activation_l2_norm",
    "Minitron": "minitron",
    "Wanda, channels": "wanda",
    "FLAP score": "flap",
    "LLM-Pruner, vectors": "llm_pruner",
    "LLM-Pruner, elements": ELEMENTS,
    "SCAR-LP": "scar_loss_proxy",
    "SCAR-Prot": "supernode_protection_score",
    "SCAR-Conn": "supernode_connectivity_score",
}
"""Label -> metric of the published scores; each is run alone, and with a one-shot refit of the down columns."""
SEQUENTIAL = ("activation norm", "Minitron", "Wanda, channels", "SCAR-LP")
"""Published scores that also get the sequential reconstruction."""
WEIGHTS_ONLY = {"magnitude (product of norms)", "OptiPFair PPM", "LLM-Rank WPR", "LLM-Rank MPR"}
"""Labels whose plan reads no text: alone, one seed is all there is."""


@dataclass(eq=False)
class Calibration:
    """One calibration text of the model; what rows need of it is made once and kept in a folder."""

    model: object
    windows: ffnscope.Windows
    seed: int
    folder: Path

    @cached_property
    def scores(self) -> dict[str, ffnscope.Scores]:
        """Scores from all windows, forward and backward; greedy OBS from a pass of its own."""
        path = self.folder / "scores.safetensors"
        if not path.exists():
            self._calibrate(path)
        return ffnscope.read_scores(path)[0]

    @cached_property
    def element_scores(self) -> ffnscope.Scores:
        """LLM-Pruner as its code has it by default: sums of |w dL/dw| over gate, up and down, of every 4th window."""
        path = self.folder / "element_scores.safetensors"
        if not path.exists():
            ffnscope.write_scores(path, [element_taylor(self.model, self.windows[::4])], {})
        return ffnscope.read_scores(path)[0][ELEMENTS]

    @cached_property
    def stats(self):
        """Sums that refits and FLAP's bias read."""
        _ = self.scores
        found, _ = ffnscope.read_stats(self.folder / "stats.safetensors")
        return found

    @cached_property
    def held_out(self):
        """Sums of every 8th window, on which one-shot refits choose their damping, as the sequential ones do."""
        path = self.folder / "held_out.safetensors"
        if not path.exists():
            found = ffnscope.collect_held_out(self.model, self.windows)
            ffnscope.write_stats(path, found.values(), {})
        return ffnscope.read_stats(path)[0]

    def _calibrate(self, path: Path) -> None:
        sums = ["h_outer", "dy_outer", "act_sum", "act_window_sq"]
        options = ffnscope.PassOptions(gradient_windows=OUTPUT_GRADIENT_WINDOWS)
        ours = ffnscope.collect(self.model, self.windows, sums, options=options)
        found = [ffnscope.score(self.model, ours, "obs_loss"), ffnscope.score(self.model, ours, "obs")]
        found.append(ffnscope.score(self.model, ours, "obs_general"))
        found.append(ffnscope.score(self.model, ours, "random", seed=self.seed))
        names = [name for name in SCORES.values() if name not in ("random", ELEMENTS)]
        stats, core = calibrate_all(self.model, self.windows, {name: {} for name in names}, sites=list(ours))
        found += [ffnscope.score(self.model, stats, name, core=core) for name in names]
        ffnscope.write_stats(self.folder / "stats.safetensors", keep(ours, ("h_outer", "act_sum")), {})
        ffnscope.write_scores(path, found, {})

    def prepare(self, label: str) -> None:
        """Make what this row shares with others, so that no row is charged with it."""
        _ = self.stats, self.held_out
        if SCORES.get(label.removesuffix(ONE_SHOT)) == ELEMENTS:
            _ = self.element_scores

    def plan(self, metric: str, sparsity: float, allocator: str = "local"):
        scores = self.element_scores if metric == ELEMENTS else self.scores[metric]
        return ffnscope.build_plan(scores, Budget(sparsity), allocator)


def element_taylor(model, windows: ffnscope.Windows) -> ffnscope.Scores:
    """Sum over the weights of a channel of |w dL/dw|, L = mean loss of the windows (arXiv:2305.11627, param_first)."""
    sites = ffnscope.find_sites(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    of_ffn = {f"{site.path}.{name}" for site in sites for name in (site.gate, site.up, site.down)}
    chosen = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") in of_ffn}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    for batch in windows.batches(4):
        loss = model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss
        (loss * len(batch) / len(windows)).backward()

    def product(site: ffnscope.FFNSite, name: str):
        weight = chosen[f"{site.path}.{name}.weight"]
        return (weight.detach() * weight.grad).abs()

    values = {s: product(s, s.gate).sum(1) + product(s, s.up).sum(1) + product(s, s.down).sum(0) for s in sites}
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    return ffnscope.Scores(ELEMENTS, values)


def keep(stats, names):
    """Only the named sums of every site."""
    return [
        ffnscope.ChannelStats(site, *({name: part[name] for name in names} for part in parts(one)))
        for site, one in stats.items()
    ]


def parts(one):
    return one.values, one.counts, one.reductions


Make = Callable[[Calibration, float], Pruned]


def alone(metric: str, allocator: str = "local") -> Make:
    return lambda c, sparsity: c.plan(metric, sparsity, allocator)


def one_shot(metric: str, allocator: str = "local") -> Make:
    return lambda c, sparsity: ffnscope.reconstruct(
        c.model, c.plan(metric, sparsity, allocator), c.stats, held_out=c.held_out
    )


def sequential(metric: str, allocator: str = "local", **options) -> Make:
    chosen = ffnscope.SequentialOptions(**options)
    return lambda c, sparsity: ffnscope.reconstruct_sequential(
        c.model, c.windows, c.plan(metric, sparsity, allocator), options=chosen
    )


def flap(c: Calibration, sparsity: float) -> Pruned:
    """FLAP as published: standardised over layers, means of what is removed become a bias."""
    return ffnscope.compensate_bias(c.model, c.plan("flap", sparsity, "standardised"), c.stats)


def measured(metric: str) -> Make:
    """Sequential reconstruction, with widths by measured loss curves."""

    def make(c: Calibration, sparsity: float) -> Pruned:
        windows = CurveRounds().windows(c.windows)
        plan, _ = ffnscope.plan_by_curves(c.model, c.scores[metric], c.stats, windows, sparsity)
        return ffnscope.reconstruct_sequential(c.model, c.windows, plan)

    return make


def in_two_rounds(c: Calibration, sparsity: float) -> Pruned:
    """The default, ranked again at half of the way; it calibrates for itself."""
    return ffnscope.plan_and_reconstruct(c.model, c.windows, sparsity, method=Method(rounds=2))


DEFAULT = "ffnscope default"
OURS: dict[str, Make] = {
    DEFAULT: sequential("scar_loss_proxy", "halfway"),
    "obs_loss, halfway + sequential": sequential("obs_loss", "halfway"),
    "obs_loss, local + sequential": sequential("obs_loss"),
    "obs_general, halfway + sequential": sequential("obs_general", "halfway"),
    "SCAR-LP, halfway + one-shot": one_shot("scar_loss_proxy", "halfway"),
    "obs_loss, halfway + one-shot": one_shot("obs_loss", "halfway"),
    "obs_loss, local + one-shot": one_shot("obs_loss"),
    "obs, local + one-shot": one_shot("obs"),
}
BASELINES: dict[str, Make] = {label: alone(metric) for label, metric in SCORES.items()}
PUBLISHED: dict[str, Make] = {"FLAP (bias, z-scores)": flap}
REFITTED: dict[str, Make] = {label + ONE_SHOT: one_shot(metric) for label, metric in SCORES.items()}
STRONG: dict[str, Make] = {f"{label} + sequential": sequential(SCORES[label]) for label in SEQUENTIAL}
UNSTRUCTURED: dict[str, Callable[[Calibration, float | str], ffnscope.SparseWeights]] = {
    "magnitude of weights": lambda c, pattern: ffnscope.magnitude_weights(c.model, pattern, scope="ffn"),
    "Wanda": lambda c, pattern: ffnscope.wanda_weights(c.model, c.windows, pattern, scope="ffn"),
    "SparseGPT": lambda c, pattern: ffnscope.sparsegpt_weights(c.model, c.windows, pattern, scope="ffn"),
    "DaSS": lambda c, pattern: ffnscope.dass_weights(c.model, c.windows, pattern),
}
"""Not channel pruning: fraction of the weights of all FFNs, or pattern N:M, that is set to zero."""
DEARER: dict[str, Make] = {
    "default, measured widths": measured("scar_loss_proxy"),
    "obs_loss, measured widths + sequential": measured("obs_loss"),
    "default, two rounds": in_two_rounds,
    "default + distillation (trained)": sequential("scar_loss_proxy", "halfway", distillation=ffnscope.Distillation()),
}
ONLY_AT = dict.fromkeys(DEARER, (0.5,))
"""Label -> sparsities, of rows that are not measured at all of them."""
ROWS: dict[str, Make] = {**BASELINES, **PUBLISHED, **OURS, **STRONG, **DEARER, **REFITTED}
SCORE_ONLY = tuple(BASELINES)
