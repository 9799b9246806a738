"""Generated pages are current, and the README tells the truth about the tree and the commands."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
import typer

from ffnscope.cli import app
from ffnscope.registry import ALLOCATORS, METRICS, STATISTICS
from scripts import load_script

ROOT = Path(__file__).parents[2]


def load_tool(name):
    return load_script(ROOT / "tools" / f"{name}.py")


def test_metrics_page_is_current():
    tool = load_tool("write_metrics")
    assert tool.TARGET.read_text(encoding="utf-8") == tool.metrics_page(), "run: python tools/write_metrics.py"


def test_every_path_of_the_readme_tree_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## The tree", 1)[1].split("```")[1]
    paths, stack = [], []
    for line in tree.strip("\n").splitlines():
        match = re.match(r"( *)([\w./{},-]+)", line)
        depth = len(match[1]) // 2
        stack = [*stack[:depth], match[2].rstrip("/")]
        paths.append("/".join(stack))
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), f"README names {path}, which does not exist"


def test_every_room_is_in_the_readme_tree():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree", 1)[1]
    for item in (ROOT / "src" / "ffnscope").iterdir():
        if item.name.startswith("_") or item.suffix in (".typed", ".pyc"):
            continue
        assert re.search(rf"^ +{re.escape(item.name)}\b", tree, re.M), f"{item.name} is missing in the README's tree"


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


@pytest.mark.model
def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks("README.md")
    assert blocks
    for code in blocks:
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "smaller" / "config.json").exists()


TUTORIALS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "tutorials").glob("*.md"))
TUTORIALS += ["docs/graph.md"]


@pytest.fixture
def registries(monkeypatch):
    """Registries that forget what a page registers."""
    for registry in (STATISTICS, METRICS, ALLOCATORS):
        registry.names()
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("page", TUTORIALS)
def test_tutorial_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    blocks = python_blocks(page)
    assert len(blocks) > 3
    for code in blocks:
        exec(compile(code, page, "exec"), namespace)
    if "allocator" in page:  # the first version must fail as the page says
        printed = capsys.readouterr().out
        assert "'spare_the_ends'" in printed and "multiple" in printed


def test_tutorials_leave_no_trace():
    assert {"steadiness"}.isdisjoint(METRICS.names())
    assert {"act_peak"}.isdisjoint(STATISTICS.names())
    assert {"spare_the_ends", "spare_the_ends_2"}.isdisjoint(ALLOCATORS.names())


def test_the_readme_links_every_tutorial():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in TUTORIALS:
        assert f"]({page})" in text


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), f"README links {target}, which does not exist"


def readme_commands():
    """Argument lists of the lines in the README's section on the command line."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Command line", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ffnscope ")]
    assert len(lines) > 5
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_commands_of_the_readme_exist(words):
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    takes_value = {name: not p.is_flag for p in command.params for name in p.opts if name.startswith("-")}
    n_arguments = 0
    while words:
        word, *words = words
        if word.startswith("-"):
            assert word in takes_value, f"there is no option {word}"
            if takes_value[word]:
                value, *words = words
                assert word not in ("-m", "--metric") or value in METRICS.names()
        else:
            n_arguments += 1
            assert (ROOT / word).exists() or not word.endswith(".yaml")
    arguments = [p for p in command.params if not any(name.startswith("-") for name in p.opts)]
    most = math.inf if any(p.nargs == -1 for p in arguments) else len(arguments)
    assert sum(p.required for p in arguments) <= n_arguments <= most


def test_every_command_is_in_the_readme():
    command = typer.main.get_command(app)
    named = {words[0] for words in readme_commands()}
    assert named == set(command.commands)
