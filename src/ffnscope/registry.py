"""Named extension points: statistics, metrics, allocators, predictors, policies; by decorator or by entry point."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from ffnscope.errors import UsageError, unknown_name
from ffnscope.rules import Allocator, Factory, Metric, Scope, Statistic
from ffnscope.types import Reduction, Role

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Registry(Generic[T]):
    """Names -> items of one kind. Built-in modules and entry points are imported at the first look-up."""

    def __init__(self, kind: str, builtin: Iterable[str], group: str):
        self.kind = kind
        self.group = group
        self._builtin = tuple(builtin)
        self._items: dict[str, T] = {}
        self._modules: dict[str, str] = {}
        self._loaded = False

    def add(self, name: str, item: T, module: str) -> None:
        """Register an item of a module; a name can be taken once."""
        if name in self._items:
            raise UsageError(f"{self.kind} {name!r} is already registered; choose another name.")
        self._items[name] = item
        self._modules[name] = module

    def get(self, name: str) -> T:
        """Return the item; raises UnknownNameError with a suggestion."""
        self._load()
        if name not in self._items:
            raise unknown_name(self.kind, name, self._items)
        return self._items[name]

    def names(self) -> list[str]:
        """All names: built-in ones by module, whatever was imported first; then others in order of registration."""
        self._load()
        return list(self._items)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        try:
            for module in self._builtin:
                importlib.import_module(module)
            for point in importlib.metadata.entry_points(group=self.group):
                self._load_point(point)
            self._order()
        except BaseException:
            self._loaded = False  # a failed import must fail again, not leave half a registry
            raise

    def _order(self) -> None:
        places = {module: place for place, module in enumerate(self._builtin)}
        items = sorted(self._items.items(), key=lambda one: places.get(self._modules.get(one[0], ""), len(places)))
        self._items.clear()
        self._items.update(items)

    def _load_point(self, point: importlib.metadata.EntryPoint) -> None:
        try:
            point.load()
        except (ImportError, AttributeError) as error:
            owner = point.dist.name if point.dist else "an installed package"
            raise UsageError(
                f"{owner} announces a {self.kind} {point.name!r} at {point.value!r} that cannot be imported: {error}. "
                "Repair or uninstall that package."
            ) from error


STATISTICS: Registry[Statistic] = Registry("statistic", ("ffnscope.calibrate.statistics",), "ffnscope.statistics")
METRICS: Registry[Metric] = Registry(
    "metric",
    tuple(
        f"ffnscope.metrics.{room}"
        for room in (
            "activation",
            "gradient",
            "weight",
            "alignment",
            "information",
            "reconstruction",
            "obs",
            "obs_general",
            "supernode",
            "combine",
            "pagerank",
            "layerwise",
            "centrality",
        )
    ),
    "ffnscope.metrics",
)
ALLOCATORS: Registry[Allocator] = Registry(
    "allocator", ("ffnscope.plan.allocate", "ffnscope.plan.unequal"), "ffnscope.allocators"
)
PREDICTORS: Registry[Factory] = Registry(
    "predictor",
    tuple(
        f"ffnscope.sparse.predictors.{room}"
        for room in ("exact", "fixed", "sign_bit", "low_bit", "whitened_svd", "low_rank", "fc_files")
    ),
    "ffnscope.predictors",
)
POLICIES: Registry[Factory] = Registry("policy", ("ffnscope.sparse.policies",), "ffnscope.policies")


_OWN: list[str] = []


def own_modules() -> tuple[str, ...]:
    """Modules of the user's that were imported by `import_own`, in order."""
    return tuple(_OWN)


def import_own(module: str) -> None:
    """Import a module of the user's, whose decorators register metrics, allocators, predictors and the like.

    It is looked for as Python does, and in the working folder last.

    Raises:
        UsageError: it cannot be imported, or takes a name that is registered already.
    """
    for registry in (STATISTICS, METRICS, ALLOCATORS, PREDICTORS, POLICIES):
        registry.names()
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        importlib.import_module(module)
        if module not in _OWN:
            _OWN.append(module)
    except (ImportError, SyntaxError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"module {module!r} cannot be imported: {error}. Give the name, without .py, of a file in the working "
            "folder or of an installed module."
        ) from error
    finally:
        if added:
            sys.path.remove(here)


def statistic(
    name: str,
    *,
    reads: tuple[str, ...],
    reduce: Reduction,
    shape: tuple[int | str, ...] = ("d_ff",),
    every: int = 1,
    counts: bool = False,
    in_place: bool = False,
) -> Callable[[F], F]:
    """Register a statistic (see `Statistic`), and for a plain sum per channel its sibling by groups of documents."""

    def add(fn: F) -> F:
        item = Statistic(name, fn, reads, reduce, shape, every, _first_line(fn), counts, in_place)
        STATISTICS.add(name, item, fn.__module__)
        if _is_vector_sum(item):
            STATISTICS.add(by_document(name), _sibling(item), fn.__module__)
        return fn

    return add


def by_document(name: str) -> str:
    """Name of the statistic that holds the sum ``name`` for each group of documents."""
    return f"{name}_by_document"


def _is_vector_sum(item: Statistic) -> bool:
    return len(item.shape) == 1 and item.reduce == "sum" and item.every == 1 and not (item.adds or item.needs_core)


def _sibling(item: Statistic) -> Statistic:
    """The same sum for each group of documents: their sum over groups is the statistic itself."""

    def fn(total: Any, *signals: Any) -> None:
        *values, document = signals
        order = document.argsort(stable=True)
        if not bool((order[1:] > order[:-1]).all()):  # tokens of an expert may be in any order
            values, document = [value[order] for value in values], document[order]
        groups, sizes = document.unique_consecutive(return_counts=True)
        for group, *parts in zip(groups.tolist(), *(v.split(sizes.tolist()) for v in values), strict=True):
            total[group] += item.fn(*parts)

    name, reads, shape = by_document(item.name), (*item.reads, "document"), ("document", *item.shape)
    return Statistic(name, fn, reads, "sum", shape, 1, f"{item.summary[:-1]}, by groups of documents.", in_place=True)


def stream_statistic(
    name: str, *, reads: tuple[str, ...], at: tuple[Role, ...], shape: tuple[int | str, ...] = ("d_ff",)
) -> Callable[[F], F]:
    """Register a sum that is also (or only) taken outside FFNs, at sites of the roles ``at`` (see `Statistic`)."""

    def add(fn: F) -> F:
        item = Statistic(name, fn, reads, "sum", shape, 1, _first_line(fn), at=at)
        STATISTICS.add(name, item, fn.__module__)
        return fn

    return add


def metric(
    name: str,
    *,
    needs: tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]] = (),
    source: str = "",
    natural_sign: Literal[1, -1] = 1,
    inputs: tuple[str, ...] = (),
    scope: Scope = "site",
    check: Callable[..., object] | None = None,
) -> Callable[[F], F]:
    """Register a metric (see `Metric`). Keyword-only arguments of the function but ``inputs`` are its parameters."""

    def add(fn: F) -> F:
        family = fn.__module__.rsplit(".", 1)[-1]
        item = Metric(name, fn, needs, source, natural_sign, family, _first_line(fn), inputs, scope, check)
        METRICS.add(name, item, fn.__module__)
        return fn

    return add


def allocator(name: str) -> Callable[[F], F]:
    """Register an allocator (see `Allocator`)."""

    def add(fn: F) -> F:
        ALLOCATORS.add(name, Allocator(name, fn, _first_line(fn)), fn.__module__)
        return fn

    return add


def predictor(name: str, *, source: str = "", options: type | None = None) -> Callable[[F], F]:
    """Register what makes a predictor of channel contributions: ``make(ffn, fit, **params)`` (see `Factory`)."""

    def add(fn: F) -> F:
        PREDICTORS.add(name, Factory(name, fn, source, _first_line(fn), options), fn.__module__)
        return fn

    return add


def policy(name: str, *, source: str = "") -> Callable[[F], F]:
    """Register a policy, a class of ``ffnscope.sparse.policies.Policy`` or what makes one (see `Factory`)."""

    def add(fn: F) -> F:
        POLICIES.add(name, Factory(name, fn, source, _first_line(fn)), fn.__module__)
        return fn

    return add


def cost_of(item: Metric) -> Literal["weights", "forward", "backward", "depends"]:
    """What a metric costs: weights only, a forward pass, forward and backward, or it depends on its parameters."""
    if callable(item.needs):
        return "depends"
    if not item.needs:
        return "weights"
    return "backward" if any(STATISTICS.get(n).needs_gradient for n in item.needs) else "forward"


def _first_line(fn: Callable[..., Any]) -> str:
    return (inspect.getdoc(fn) or "").split("\n", 1)[0]
