"""What ffnscope does with every causal LM of `transformers`: one `Row` per architecture, measured on a tiny model."""

from __future__ import annotations

import json
import re
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ffnscope.apply.export import prune_, save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.slice import slice_
from ffnscope.calibrate.taps import channel_taps
from ffnscope.errors import UsageError
from ffnscope.ffn.load import quiet_transformers
from ffnscope.ffn.probe import layer_path
from ffnscope.ffn.projection import modules_of
from ffnscope.ffn.survey import Survey, describe, nothing_found, survey
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from ffnscope.types import FFNSite, PruningPlan
from tiny_all import D_FF, EXPERT, SECOND, SHARED, inputs_of, load_arguments, logits_of, tiny_causal_lm

SPARSITY, TOLERANCE, VISIBLE = 0.25, 1e-4, 1e-3
LIBRARY = "transformers"
STAND_IN = "its vision tower is a stand-in, so it is loaded with the config in memory"
Status = Literal["ok", "with code", "refused", "failed", "–"]


@dataclass(frozen=True, slots=True)
class Row:
    """One architecture: what was found, what each check gave, and why where it is not "ok".

    ``ours`` names the failed checks that the library is not to blame for.
    """

    name: str
    model_class: str = ""
    sites: int = 0
    layout: str = ""
    built: Status = "ok"
    found: Status = "–"
    cut: Status = "–"
    gradients: Status = "–"
    reload: Status = "–"
    why: str = ""
    ours: tuple[str, ...] = ()


def check(name: str) -> Row:
    """Build an architecture (or variant) and run every check on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = Row(name)
        try:
            model = tiny_causal_lm(name)
            dense = _logits(model)
        except Exception as error:  # noqa: BLE001  whatever the library raises is the reason that the table gives
            return replace(row, built="failed", why=f"{LIBRARY} cannot build it: {_text(error)}")
        found = survey(model)
        row = replace(row, model_class=found.model_class, sites=len(found.sites), layout=_layout(found.sites))
        if not found.sites:
            return replace(row, found="refused", why=str(nothing_found(model, found)))
        left = _left_out(model, found)
        row = replace(row, found="failed" if left else "refused" if found.refused else "ok")
        row = replace(row, why=_join(left, describe(found.refused)), ours=("found",) if left else ())
        for step, run in (("cut", _check_cut), ("gradients", _check_gradients), ("reload", _check_reload)):
            try:
                status, why = run(name, model, found.sites, dense)
            except Exception as error:  # noqa: BLE001  a crash is a failed check, and the table says which
                # where nothing is cut, an error of the library is its own; after a cut it may be due to the cut
                blame = _blame(error) if step == "gradients" else ""
                status, why = "failed", f"{blame}{type(error).__name__}: {_text(error)}"
            ours = (step,) if status == "failed" and not why.startswith(LIBRARY) else ()
            row = replace(row, **{step: status}, why=_join(row.why, why), ours=(*row.ours, *ours))
        return row


def _check_cut(name: str, model: Any, sites: Sequence[FFNSite], dense: Tensor) -> tuple[Status, str]:
    """Mask equals slice; masking is visible; slicing other channels is not the same."""
    plan, other = _plan(model, sites, 1), _plan(model, sites, 2)
    with masked(model, plan):
        expected = _logits(model)
    found = _logits(slice_(tiny_causal_lm(name), plan))
    control = _logits(slice_(tiny_causal_lm(name), other))
    problems = [
        f"{what} by {_distance(a, b):.1g}"
        for what, a, b, bad in (
            ("mask and slice differ", found, expected, _distance(found, expected) >= TOLERANCE),
            ("masking moves the logits only", expected, dense, _distance(expected, dense) < VISIBLE),
            ("slicing other channels differs only", control, expected, _distance(control, expected) < VISIBLE),
            ("the mask left the model changed", _logits(model), dense, not torch.equal(_logits(model), dense)),
        )
        if bad
    ]
    return ("failed" if problems else "ok"), "; ".join(problems)


def _check_gradients(name: str, model: Any, sites: Sequence[FFNSite], dense: Tensor) -> tuple[Status, str]:
    """The gradient of the loss reaches the channels of every site, but for experts that have no token."""
    reached: set[FFNSite] = set()
    used = {s for s in sites if s.expert is None}

    def note(site: FFNSite, h: Tensor, g: Tensor) -> None:
        if bool((g != 0).any()):
            reached.add(site)

    model = tiny_causal_lm(name)
    with channel_taps(model, sites, lambda site, _: used.add(site), note):
        logits_of(model).log_softmax(-1)[..., 0].sum().backward()
    missed = [s.name for s in sites if s in used and s not in reached]
    if not missed:
        return "ok", ""
    return "failed", f"no gradient at {len(missed)} of {len(sites)} FFNs: {_patterns(missed)}"


def _check_reload(name: str, model: Any, sites: Sequence[FFNSite], dense: Tensor) -> tuple[Status, str]:
    """Saved and loaded, by its stock class or by the code beside it, the pruned model gives the same logits."""
    try:
        status, problem = _reloaded(prune_(tiny_causal_lm(name), _plan(model, sites, 1)))
    except UsageError as error:
        return "refused", _text(error)
    if not problem:
        return status, STAND_IN if load_arguments(model) else ""
    if _reloaded(tiny_causal_lm(name))[1]:
        return "failed", f"{LIBRARY}: the unpruned model, saved and loaded, has the same problem: {problem}"
    return "failed", problem


def _reloaded(model: Any) -> tuple[Status, str]:
    """Save and load a model; returns how it was loaded, and what is wrong with it."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        target = Path(folder) / "saved"
        save_model(model, None, target)
        coded = "auto_map" in json.loads((target / "config.json").read_text())
        try:
            loaded: Any = (
                AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
                if coded
                else type(model).from_pretrained(target, **load_arguments(model))
            )
        except Exception as error:  # noqa: BLE001  the table gives the reason
            return "failed", f"{type(error).__name__}: {_text(error).split('. ')[0]}"
        distance = _distance(_logits(loaded.eval()), _logits(model))
    return ("with code" if coded else "ok"), "" if distance < TOLERANCE else "other logits"


def _left_out(model: Any, found: Survey) -> str:
    """Parameters that took part in a forward, are as wide as some FFN, and are neither in a site nor told of."""
    widths = {w for s in found.sites for w in (s.d_ff, 2 * s.d_ff)}
    widths |= {w for width in (D_FF, SECOND, EXPERT, SHARED) for w in (width, 2 * width)}
    taken = {name for s in found.sites for name in modules_of(s)}
    taken |= {name.rpartition(".")[0] for s in found.sites if s.expert is not None for name in s.projections}
    told = [one.path.rpartition(".")[0] for one in (*found.refused, *found.helpers)]
    ran: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: ran.append(name)

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if name not in taken
        and layer_path(name)
        and not any(name.startswith(path) for path in told)
        and any(p.dim() > 1 and set(p.shape) & widths for p in module.parameters(recurse=False))
    ]
    _logits(model)
    for hook in hooks:
        hook.remove()
    return f"in no FFN, but as wide: {_patterns(ran)}" if ran else ""


def _plan(model: Any, sites: Sequence[FFNSite], seed: int) -> PruningPlan:
    return build_plan(score(model, sites, "random", seed=seed), SPARSITY)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return logits_of(model, inputs_of(model))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _join(*parts: str) -> str:
    return "; ".join(p for p in parts if p)


def _layout(sites: Sequence[FFNSite]) -> str:
    """Kinds of FFN with their names, such as ``gated gate_proj/up_proj/down_proj``."""
    kinds = [s.fused or ("plain" if s.gate is None else "gated") for s in sites]
    names = ["/".join(n.rsplit(".", 1)[-1] for n in s.projections) for s in sites]
    more = [_more(s) for s in sites]
    return ", ".join(dict.fromkeys(f"{k} {n}{m}" for k, n, m in zip(kinds, names, more, strict=True)))


def _more(site: FFNSite) -> str:
    """What stands beside the projections, such as " behind ffn_sub_norm"."""
    norm = "" if site.norm is None else f" behind {site.norm}"
    adapters = f" with {len(site.adapters)} adapters" if site.adapters else ""
    twins = f" of {1 + len(site.twins)} layers" if site.twins else ""
    runs = f" run {site.runs} times" if site.runs > 1 else ""
    return f"{norm}{adapters}{twins}{runs}"


def _patterns(names: Sequence[str]) -> str:
    """Module names with layer numbers replaced by ``*``, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def _blame(error: Exception) -> str:
    """Name the library when its own code raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{LIBRARY}: " if frames and LIBRARY in Path(frames[-1].filename).parts else ""


def _text(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{error}").strip()
