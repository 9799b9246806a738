from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ffnscope import registry
from ffnscope.errors import UnknownNameError, UsageError
from ffnscope.registry import ALLOCATORS, METRICS, STATISTICS, Registry

PLUGIN = """
from ffnscope.registry import metric

@metric("from_plugin", source="here")
def from_plugin(stats, weights):
    \"\"\"What a plug-in scores.\"\"\"
    return weights.up.sum(1)
"""


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Whatever a test registers is gone afterwards; the built-in names are there before and after."""
    for found in (STATISTICS, METRICS, ALLOCATORS):
        found.names()
    before = {id(r): (r, dict(r._items), r._loaded) for r in (STATISTICS, METRICS, ALLOCATORS)}
    yield
    for found, items, loaded in before.values():
        found._items.clear()
        found._items.update(items)
        found._loaded = loaded


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, entry: str, code: str = PLUGIN) -> None:
    """Install a distribution with one entry point and one module, as pip would lay it out."""
    (folder / "ffnscope_plugin.py").write_text(code)
    info = folder / "a_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ffnscope.metrics]\n{entry}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "ffnscope_plugin", raising=False)
    importlib.invalidate_caches()


def test_built_in_names() -> None:
    assert {"local", "global"} <= set(ALLOCATORS.names())
    assert {"random", "wanda", "magnitude", "scar_loss_proxy"} <= set(METRICS.names())
    assert {"act_sq", "taylor_sq"} <= set(STATISTICS.names())


def test_every_metric_needs_registered_statistics_and_says_where_it_is_from() -> None:
    for name in METRICS.names():
        item = METRICS.get(name)
        assert set(item.needed({})) <= set(STATISTICS.names())
        assert item.source
        assert item.summary


def test_did_you_mean() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown metric 'wandas'. Did you mean 'wanda'\? Known: "):
        METRICS.get("wandas")
    with pytest.raises(UnknownNameError, match=r"Unknown allocator 'locale'. Did you mean 'local'\?"):
        ALLOCATORS.get("locale")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(UsageError, match="metric 'wanda' is already registered; choose another name"):
        registry.metric("wanda")(lambda stats, weights: weights.up)


def test_a_metric_is_one_decorated_function() -> None:
    @registry.metric("mine", needs=("act_sq",), source="here", natural_sign=-1)
    def mine(stats: object, weights: object, *, power: float = 2.0) -> None:
        """First line.

        More.
        """

    item = METRICS.get("mine")
    assert item.fn is mine
    assert (item.needs, item.source, item.natural_sign) == (("act_sq",), "here", -1)
    assert item.summary == "First line."
    assert [p.default for p in item.params.values()] == [2.0]
    assert registry.cost_of(item) == "forward"


def test_costs() -> None:
    costs = {name: registry.cost_of(METRICS.get(name)) for name in ("random", "wanda", "scar_loss_proxy")}
    assert costs == {"random": "weights", "wanda": "forward", "scar_loss_proxy": "backward"}


def test_a_statistic_and_an_allocator() -> None:
    @registry.statistic("cube", reads=("h", "g"), reduce="max", shape=("d_ff", 2), every=4)
    def cube(h: object, g: object) -> None:
        """Cubes."""

    @registry.allocator("mine")
    def mine(scores: object, budget: object) -> None:
        """Mine."""

    found = STATISTICS.get("cube")
    assert (found.reads, found.reduce, found.shape, found.every) == (("h", "g"), "max", ("d_ff", 2), 4)
    assert found.needs_gradient and not STATISTICS.get("act_sq").needs_gradient
    assert ALLOCATORS.get("mine").summary == "Mine."


def test_a_statistic_reads_known_signals_and_has_a_known_shape() -> None:
    def make(**changes: Any) -> None:
        registry.statistic("mine", **{"reads": ("h",), "reduce": "sum"} | changes)(lambda *signals: None)

    with pytest.raises(UnknownNameError, match=r"Unknown signal of statistic 'mine' 'hh'. Did you mean 'h'\?"):
        make(reads=("hh",))
    with pytest.raises(UnknownNameError, match=r"Unknown size of statistic 'mine' 'd_f'. Did you mean 'd_ff'"):
        make(shape=("d_f",))
    with pytest.raises(UsageError, match="'mine' reads no signal; it must read one or more of x, h, y, dy, g"):
        make(reads=("core",))
    with pytest.raises(UsageError, match="'mine' has a shape with 'core' but does not read 'core'"):
        make(shape=("core", "d_ff"))
    with pytest.raises(UsageError, match=r"'mine': every must be at least 1 \(all tokens\); got 0"):
        make(every=0)
    assert "mine" not in STATISTICS.names()
    make(reads=("x", "core"), shape=("core", 3, "d_model"))
    assert STATISTICS.get("mine").needs_core and not STATISTICS.get("mine").needs_gradient


def test_the_signal_dy_needs_a_backward() -> None:
    registry.statistic("mine", reads=("dy",), reduce="sum", shape=("d_model",))(lambda dy: dy.sum(0))
    assert STATISTICS.get("mine").needs_gradient
    registry.metric("mine", needs=("mine",))(lambda stats, weights: weights.up.sum(1))
    assert registry.cost_of(METRICS.get("mine")) == "backward"


def test_the_inputs_of_a_metric() -> None:
    @registry.metric("mine", inputs=("core",))
    def mine(stats: object, weights: object, *, core: object, power: float = 2.0) -> None:
        """Mine."""

    assert METRICS.get("mine").inputs == ("core",)
    assert list(METRICS.get("mine").params) == ["power"]
    with pytest.raises(UnknownNameError, match=r"Unknown input of metric 'other' 'cores'. Did you mean 'core'"):
        registry.metric("other", inputs=("cores",))(mine)
    text = r"'other' asks for the input 'reference', but its function has no keyword-only argument of that name: write"
    with pytest.raises(UsageError, match=text):
        registry.metric("other", inputs=("reference",))(mine)
    with pytest.raises(UsageError, match="no keyword-only argument"):
        registry.metric("other", inputs=("core",))(lambda stats, weights, core: weights.up.sum(1))


def test_a_metric_whose_needs_depend_on_its_parameters() -> None:
    item = METRICS.get("composite")
    assert registry.cost_of(item) == "depends"
    assert item.needed({"parts": {"wanda": 1}}) == ("act_sq",)


def test_an_installed_package_brings_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "from_plugin = ffnscope_plugin:from_plugin")
    METRICS._loaded = False
    assert "from_plugin" in METRICS.names()
    assert METRICS.get("from_plugin").summary == "What a plug-in scores."


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ("broken = ffnscope_plugin:missing", "x = 1"),
        ("broken = ffnscope_plugin:x", "import a_module_that_is_not_there"),
    ],
)
def test_a_broken_package_is_named_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, code: str
) -> None:
    install(tmp_path, monkeypatch, entry, code)
    METRICS._loaded = False
    for _ in range(2):
        with pytest.raises(UsageError, match=r"a-plugin announces a metric 'broken' at 'ffnscope_plugin:.*Repair or"):
            METRICS.names()


def test_built_in_modules_are_imported_at_the_first_look_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_module_of_a_test.py").write_text("LOADED = True")
    monkeypatch.syspath_prepend(tmp_path)
    lazy: Registry[int] = Registry("thing", ("lazy_module_of_a_test",), "ffnscope.no_such_group")
    lazy.add("one", 1, __name__)
    assert "lazy_module_of_a_test" not in sys.modules
    assert lazy.get("one") == 1
    assert "lazy_module_of_a_test" in sys.modules


def test_names_come_module_by_module_whatever_was_imported_first() -> None:
    found: Registry[int] = Registry("thing", ("json", "string"), "ffnscope.no_such_group")
    for n, (name, module) in enumerate([("own", "mine"), ("b", "string"), ("a", "string"), ("c", "json")]):
        found.add(name, n, module)
    assert found.names() == ["c", "b", "a", "own"]
    found.add("later", 9, "json")
    assert found.names() == ["c", "b", "a", "own", "later"]


def test_a_module_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_of_mine.py").write_text(PLUGIN)
    (tmp_path / "own_broken.py").write_text("def (")
    (tmp_path / "own_taken.py").write_text(PLUGIN.replace('"from_plugin"', '"wanda"'))
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    before = list(sys.path)
    registry.import_own("own_of_mine")
    assert METRICS.get("from_plugin").summary == "What a plug-in scores."
    registry.import_own("own_of_mine")  # once is enough
    for name, text in (
        (
            "own_nowhere",
            "module 'own_nowhere' cannot be imported: No module named 'own_nowhere'. Give the name, without",
        ),
        ("own_broken", "module 'own_broken' cannot be imported: invalid syntax"),
        ("", "module '' cannot be imported: Empty module name"),
        ("own_taken", "metric 'wanda' is already registered"),
    ):
        with pytest.raises(UsageError, match=text):
            registry.import_own(name)
    assert sys.path == before
    for name in ("own_of_mine", "own_taken"):
        sys.modules.pop(name, None)
