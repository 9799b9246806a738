"""Write docs/coverage.md from the checks of the coverage test: ``python tools/write_coverage.py`` (minutes)."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

from coverage_page import coverage_page  # noqa: E402
from ffnscope.io import write_text  # noqa: E402
from layout_coverage import check  # noqa: E402
from tiny_all import VARIANTS, architectures  # noqa: E402

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        rows = list(pool.imap(check, [*architectures(), *VARIANTS]))
    write_text(ROOT / "docs" / "coverage.md", coverage_page(rows))
