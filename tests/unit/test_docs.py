"""Generated pages are current, and the README tells the truth about the tree and the commands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
