"""The report in a real browser: no error, and every figure shows something, on a desk and on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from checkpoints import make_checkpoint, write_texts
from ffnscope.run import config_from_dict
from runs import quiet_run, small_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
MEASURE = """
const all = [...document.querySelectorAll("svg")].map(s => {
  const size = e => e.getBoundingClientRect(), box = size(s), shown = e => size(e).width + size(e).height > 0;
  const count = what => [...s.querySelectorAll(what)].filter(shown).length;
  return [Math.round(box.width), Math.round(box.height), count("path,use,image"), count("text")];
});
document.title = JSON.stringify([document.documentElement.scrollWidth, window.innerWidth, ...all]);
"""
COMMON = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(BROWSERS)} is installed"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_checkpoint(tmp_path_factory.mktemp("model") / "llama")
    texts = write_texts(tmp_path_factory.mktemp("texts"))
    out = tmp_path_factory.mktemp("out") / "run"
    config = small_run(model, texts, out, output={"report": True})
    return quiet_run(config_from_dict(config)).folder / "report.html"


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    profile = f"--user-data-dir={page.parent / 'profile'}"
    return subprocess.run(
        [BROWSER, *COMMON, profile, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )


def test_the_page_opens_without_an_error(page: Path) -> None:
    found = browse(page, "--dump-dom")
    assert "CONSOLE" not in found.stderr
    assert found.stdout.count("<svg") == page.read_text().count("<svg ") > 4
    assert found.stdout.count("<section") == page.read_text().count("<section")


@pytest.mark.parametrize(("width", "least"), [(1280, 440), (500, 310)])
def test_every_figure_shows_something_and_the_page_is_not_wider_than_the_window(
    page: Path, width: int, least: int
) -> None:
    measuring = page.with_name(f"measured-{width}.html")
    measuring.write_text(page.read_text().replace("</body>", f"<script>{MEASURE}</script></body>"))
    found = re.search(r"<title>(\[.*?\])</title>", browse(measuring, "--dump-dom", f"--window-size={width},900").stdout)
    assert found is not None, "the page did not run"
    whole, window, *figures = json.loads(found[1])
    assert whole <= window, "the page is wider than the window"
    assert len(figures) == page.read_text().count("<svg ")
    for number, (wide, high, marks, words) in enumerate(figures):
        assert wide >= least and high > 100, f"figure {number} is too small to read: {wide} x {high}"
        assert marks > 10 and words > 5, f"figure {number} is empty: {marks} shapes, {words} words"
