"""The import rule, the fences around heavy libraries, the sizes: the architecture as a test."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ffnscope

PACKAGE = "ffnscope"
ROOT = Path(ffnscope.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

RANK = {
    "errors": -3,
    **dict.fromkeys(("display", "budget"), -2),
    "types": -1,
    **dict.fromkeys(("rules", "saving"), 0),
    **dict.fromkeys(("registry", "io", "unchanged", "graph"), 1),
    **dict.fromkeys(("ffn", "metrics"), 2),
    **dict.fromkeys(("calibrate", "scoring", "plan"), 3),
    "apply": 4,
    "evaluate": 5,
    **dict.fromkeys(("sparse", "analyze"), 6),
    **dict.fromkeys(("report", "testing"), 7),
    "run": 8,
    "__init__": 9,
    "cli": 10,
    "__main__": 11,
}
FENCES = {
    "transformers": ("ffn", "apply", "evaluate", "sparse", "run"),
    "datasets": ("calibrate/text.py",),
    "matplotlib": tuple(
        f"report/{name}.py"
        for name in (
            *("plots", "drawing", "layered_graph", "validation_plots", "analysis_plots", "curve_plots", "sparse_plots"),
            *("inline_svg", "figures", "relufy_plot", "card_plot"),
        )
    ),
    "numba": ("sparse/kernels/compiled.py",),
    "llvmlite": ("sparse/kernels/compiled.py",),
    "triton": ("sparse/kernels/on_gpu.py",),
    "lm_eval": ("evaluate/tasks.py", "evaluate/task_model.py"),
    "submitit": ("run/executors.py",),
    "ray": ("run/executors.py",),
}
HEAVY = ("transformers", "datasets", "matplotlib", "pydantic", "lm_eval", "numba", "triton", "submitit", "ray")
FILE_CEILING, FUNCTION_CEILING = 400, 60
BANNED_FILES = ("utils.py", "helpers.py", "common.py")


def imports(tree: ast.Module, inside: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, also inside functions; ``inside`` = the package's parts of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def rank_violations(root: Path, package: str = PACKAGE) -> list[str]:
    found: list[str] = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        room = parts[0].removesuffix(".py")
        if room not in RANK:
            found.append(f"{'/'.join(parts)} is in a room without a rank")
            continue
        for line, name in imports(ast.parse(file.read_text()), (package, *parts[:-1])):
            target = name.split(".")
            if target[0] != package or len(target) < 2 or target[1] == room:
                continue
            # a name that is no room comes from the package itself
            if RANK.get(target[1], RANK["__init__"]) >= RANK[room]:
                found.append(f"{'/'.join(parts)}:{line} ({RANK[room]}) imports {name}")
    return found


def fence_violations(root: Path, package: str = PACKAGE) -> list[str]:
    found: list[str] = []
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root).as_posix()
        for line, name in imports(ast.parse(file.read_text()), (package, *Path(place).parts[:-1])):
            allowed = FENCES.get(name.split(".")[0])
            if allowed is not None and not any(place == a or place.startswith(f"{a}/") for a in allowed):
                found.append(f"{place}:{line} imports {name}, which only {', '.join(allowed)} may")
    return found


def test_a_module_imports_only_lower_ranks_or_its_own_room() -> None:
    assert rank_violations(ROOT) == []


def test_heavy_libraries_stay_behind_their_fences() -> None:
    assert fence_violations(ROOT) == []


@pytest.mark.parametrize(
    ("place", "text", "complaint"),
    [
        ("metrics/a.py", "from ffnscope.plan.build import build_plan\n", "imports ffnscope.plan.build.build_plan"),
        ("metrics/a.py", "def f():\n    import ffnscope.cli\n", "metrics/a.py:2 (2) imports ffnscope.cli"),
        ("metrics/a.py", "from ..evaluate import compare\n", "imports ffnscope.evaluate.compare"),
        ("io.py", "from . import registry\n", "imports ffnscope.registry"),
        ("apply/a.py", "from ffnscope import evaluate\n", "imports ffnscope.evaluate"),
        ("plan/a.py", "from ffnscope import masked\n", "imports ffnscope.masked"),
        ("attic/a.py", "", "room without a rank"),
    ],
)
def test_the_rank_rule_sees_what_it_should(tmp_path: Path, place: str, text: str, complaint: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    (violation,) = rank_violations(tmp_path)
    assert complaint in violation


def test_the_rank_rule_allows_lower_ranks_and_neighbours(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    text = "import torch\nfrom . import allocate\nfrom .allocate import local\nfrom ffnscope.types import Budget\n"
    (tmp_path / "plan" / "build.py").write_text(text)
    assert rank_violations(tmp_path) == []


def test_the_fence_sees_a_hidden_import(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "tables.py").write_text("def f():\n    from matplotlib import pyplot\n")
    (tmp_path / "report" / "plots.py").write_text("import matplotlib\n")
    assert fence_violations(tmp_path) == [
        f"report/tables.py:2 imports matplotlib.pyplot, which only {', '.join(FENCES['matplotlib'])} may"
    ]


def test_import_is_light() -> None:
    """What is not loaded takes no time; a clock would fail the test on a busy machine."""
    code = "import sys, json, ffnscope; print(json.dumps(sorted(sys.modules)))"
    loaded = {
        name.split(".")[0] for name in json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    }
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_sizes_names_and_broad_excepts(file: Path) -> None:
    text = file.read_text()
    assert file.name not in BANNED_FILES
    assert text.count("\n") <= FILE_CEILING
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_CEILING, f"{node.name} is too long"
        if isinstance(node, ast.ExceptHandler):
            kinds = [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)] if node.type else ["bare"]
            assert not {"Exception", "bare"} & set(kinds), f"line {node.lineno} catches everything"
