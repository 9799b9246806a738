"""Which predictor and which policy, by name: what makes the selection of every FFN of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import ArtifactError, UsageError, unknown_name
from ffnscope.ffn.function import FFN
from ffnscope.io import hash_file
from ffnscope.registry import POLICIES, PREDICTORS
from ffnscope.sparse.policies import ChannelThreshold, Hybrid, Policy, TopK, channel_gain
from ffnscope.sparse.predictors.fixed import kept_by
from ffnscope.sparse.predictors.interface import FitTokens, Predictor, needed, token_mean
from ffnscope.sparse.predictors.restore import restore_predictor
from ffnscope.sparse.readings import readings_of

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"low_bit": {"bits": 4, "group": 64}, "griffin": {"prompt": 32}}
"""Parameters of a predictor for those who name none, where it asks for some."""
FILES = {"static": "plan", "fc_files": "folder"}
"""Predictor -> its parameter that names a file, or a folder of predictors."""
GAIN_TOKENS = 4096
"""Tokens on which gains of channels are measured, at most."""

TRAINED = ("low_rank", "deja_vu")
"""Predictors whose matrices are trained."""


@dataclass(frozen=True, slots=True)
class SelectionRule:
    """A predictor and a policy, with their parameters as a file can hold them.

    Two policies are given something of each FFN: ``channel_threshold`` its gains, and ``hybrid`` its core. That is the
    share ``core`` (default 0.02) of channels with the largest mean contributions, or what a pruning plan keeps, whose
    file ``core`` names: the supernodes, where the plan keeps the top 1 % by scar_loss_proxy. All else in the parameters
    of ``hybrid`` is ``rest``, the name of the other policy, and its parameters.

    Attributes:
        predictor: name.
        policy: name.
        predictor_params: keyword arguments of the predictor's factory.
        policy_params: keyword arguments of the policy.
    """

    predictor: str = "low_bit"
    policy: str = "nucleus"
    predictor_params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    policy_params: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        _check_params("predictor", self.predictor, self.predictor_params, PREDICTORS.get(self.predictor).params)
        if self.lookahead not in (0, 1):
            raise UsageError(f"lookahead must be 0 or 1 layers; got {self.lookahead}.")
        if self.predictor == "griffin" and self.prompt < 1:
            raise UsageError(
                "griffin takes its scores from a prompt; give prompt, the tokens at the beginning of each window that "
                f"are one, at least 1 (default {DEFAULTS['griffin']['prompt']}); got {self.prompt}."
            )
        policy, params = self._plain_policy()
        own = {} if policy == "channel_threshold" else POLICIES.get(policy).params
        _check_params("policy", policy, params, own)
        if policy != "channel_threshold":
            POLICIES.get(policy).make(**params)  # refuses impossible values
        options = PREDICTORS.get(self.predictor).options
        if options is not None:
            options(**{k: v for k, v in self.predictor_params.items() if k in inspect.signature(options).parameters})

    @property
    def lookahead(self) -> int:
        """1 where predictors read the input of the FFN one layer before, wherever there is one; else 0."""
        return self.predictor_params.get("lookahead", 0)

    @property
    def prompt(self) -> int:
        """Tokens at the beginning of each window that run dense, since scores are taken from them; 0 for most rules."""
        return self.predictor_params.get("prompt", 0) if self.predictor == "griffin" else 0

    @property
    def trained(self) -> bool:
        """Whether its predictors are trained matrices, which a card keeps of FFNs that stay dense too."""
        return self.predictor in (*TRAINED, "fc_files")

    def check_parameter(self, value: float) -> None:
        """Raise UsageError for a parameter that the policy cannot have."""
        policy, params = self._plain_policy()
        made: Policy = (
            ChannelThreshold(torch.ones(1)) if policy == "channel_threshold" else POLICIES.get(policy).make(**params)
        )
        made.level(value)

    def own(self, *, ahead: bool, params: Mapping[str, Any] | None = None) -> SelectionRule:
        """The rule of one FFN: without lookahead where there is no FFN before it, with parameters that are its own.

        Args:
            ahead: whether there is one before it.
            params: further ones of the predictor (`ffnscope.sparse.site_params`).
        """
        own = dict(params or {}) if ahead or not self.lookahead else {"lookahead": 0, **(params or {})}
        return replace(self, predictor_params={**self.predictor_params, **own}) if own else self

    def identity(self) -> list[Any]:
        """All that results depend on, to be hashed: names, parameters, and the content of files that these name."""
        named = [self.predictor_params.get(FILES.get(self.predictor, "")), self._core_plan]
        files = [_content(Path(str(one))) for one in named if one is not None]
        params = dict(self.predictor_params), dict(self.policy_params)
        return [self.predictor, self.policy, *params, *files]

    def make_predictor(self, ffn: FFN, fit: FitTokens | None) -> Predictor:
        """The predictor of an FFN."""
        made: Predictor = PREDICTORS.get(self.predictor).make(ffn, fit, **self.predictor_params)
        return made.eval().requires_grad_(False)

    def make_policy(self, predictor: Predictor, fit: FitTokens | None) -> Policy:
        """The policy of an FFN."""
        name, params = self._plain_policy()
        if name == "channel_threshold":
            return ChannelThreshold(_gain(predictor, needed(fit, "channel_threshold")))
        made: Policy = POLICIES.get(name).make(**params)
        if self.policy != "hybrid":
            return made
        if self._core_plan is not None:
            return Hybrid(kept_by(self._core_plan, predictor.ffn.name), made)
        mean = token_mean(needed(fit, "hybrid").x, predictor.ffn.contributions).float()
        k = round(self.core_share * len(mean))
        return Hybrid(TopK().select(mean[None], k)[0].nonzero().flatten(), made)

    def restore(self, ffn: FFN, tensors: Mapping[str, Tensor]) -> tuple[Predictor, Policy]:
        """Predictor and policy of an FFN from what `tensors_of` gave."""
        state = {k.removeprefix("predictor/"): v for k, v in tensors.items() if k.startswith("predictor/")}
        predictor = restore_predictor(self.predictor, ffn, self.predictor_params, state)
        name, params = self._plain_policy()
        if name == "channel_threshold":
            return predictor, ChannelThreshold(tensors["policy/gain"])
        made: Policy = POLICIES.get(name).make(**params)
        return predictor, Hybrid(tensors["policy/core"], made) if self.policy == "hybrid" else made

    @property
    def core_share(self) -> float:
        """Share of channels in the core of ``hybrid``; 0 where a plan says which these are."""
        return self.policy_params.get("core", 0.02) if self._core_plan is None else 0.0

    @property
    def _core_plan(self) -> Path | None:
        """The file of the plan whose kept channels are the core of ``hybrid``."""
        core = self.policy_params.get("core") if self.policy == "hybrid" else None
        return Path(core) if isinstance(core, str) else None

    def check_core(self, names: Iterable[str]) -> None:
        """Raise what `make_policy` would for the core of FFNs of these names, as far as a plan says it."""
        if (plan := self._core_plan) is not None:
            for name in names:
                kept_by(plan, name)

    def _plain_policy(self) -> tuple[str, dict[str, Any]]:
        """The policy that decides by scores, and its parameters."""
        if self.policy != "hybrid":
            return self.policy, dict(self.policy_params)
        rest = self.policy_params.get("rest", "nucleus")
        core = self.policy_params.get("core", 0.02)
        _check_type("core of policy 'hybrid'", "float | str", core)
        possible = core.endswith(".json") if isinstance(core, str) else 0 <= core < 1
        if not possible:
            raise UsageError(
                f"hybrid needs as core a share in [0, 1) or the .json file of a pruning plan; got {core!r}."
            )
        if rest in ("hybrid", "channel_threshold"):
            simple = ", ".join(name for name in POLICIES.names() if name not in ("hybrid", "channel_threshold"))
            raise UsageError(f"rest of hybrid must be a policy that fits no tensors ({simple}); got {rest!r}.")
        return rest, {k: v for k, v in self.policy_params.items() if k not in ("core", "rest")}


@torch.no_grad()
def _gain(predictor: Predictor, fit: FitTokens) -> Tensor:
    """Gains of channels on the first tokens."""
    scores: list[Tensor] = []
    contributions: list[Tensor] = []
    for x, seen in readings_of(predictor, fit).chunks(predictor, GAIN_TOKENS):
        if sum(map(len, scores)) >= GAIN_TOKENS:
            break
        scores.append(predictor(seen))
        contributions.append(predictor.ffn.contributions(x))
    return channel_gain(torch.cat(scores), torch.cat(contributions))


def _content(path: Path) -> str | dict[str, str]:
    """Hash of a file, or of each predictor in a folder; raises ArtifactError for what is not there."""
    if path.is_dir():
        return {one.name: hash_file(one) for one in sorted(path.glob("model_*.pt"))}
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; a parameter names it.")
    return hash_file(path)


def rule_of(
    predictor: str, policy: str, predictor_params: Mapping[str, Any], policy_params: Mapping[str, Any]
) -> SelectionRule:
    """A rule whose parameters are what was given over `DEFAULTS`; raises as `SelectionRule`."""
    return SelectionRule(predictor, policy, {**DEFAULTS.get(predictor, {}), **predictor_params}, dict(policy_params))


def tensors_of(predictor: Predictor, policy: Policy) -> dict[str, Tensor]:
    """All tensors that a file needs to make these two again.

    They are "predictor/NAME" in the shapes of its state_dict, "policy/gain" [d_ff] of a threshold per channel, and
    "policy/core" [n] of hybrid.
    """
    found = {f"predictor/{name}": value.detach().cpu() for name, value in predictor.state_dict().items()}
    if isinstance(policy, ChannelThreshold):
        found["policy/gain"] = policy.gain.cpu()
    if isinstance(policy, Hybrid):
        found["policy/core"] = policy.core.cpu()
    return found


def _check_params(kind: str, name: str, asked: Mapping[str, Any], known: Mapping[str, inspect.Parameter]) -> None:
    for key in asked:
        if key not in known:
            raise unknown_name(f"parameter of {kind} {name!r}", key, known)
        _check_type(f"{key} of {kind} {name!r}", known[key].annotation, asked[key])
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in asked:
            raise UsageError(
                f"{kind} {name!r} needs {key}; give it in {kind}_params, or by --{kind}-param {key}=VALUE."
            )


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
    "Mapping": (Mapping,),
    "Tensor": (Tensor,),
}


def _check_type(what: str, annotation: Any, value: Any) -> None:
    """Refuse a plain value of another type than a signature declares; other types are left to who takes them."""
    names = [name.partition("[")[0] for name in str(getattr(annotation, "__name__", annotation)).split(" | ")]
    allowed = [one for name in names for one in _TYPES.get(name, (object,))]
    fits = bool in allowed or object in allowed if isinstance(value, bool) else isinstance(value, tuple(allowed))
    if not fits:
        raise UsageError(f"{what} must be {' or '.join(names)}; got {value!r}.")
