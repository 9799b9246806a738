"""docs/coverage.md from the rows of `layout_coverage`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from layout_coverage import SPARSITY, TOLERANCE, VISIBLE, Row
from tiny_all import VARIANTS

HEAD = "| architecture | FFNs | kind | found | mask = slice | gradients | reload | why not |"
RULE = "|---|---:|---|---|---|---|---|---|"


def coverage_page(rows: Sequence[Row]) -> str:
    """Markdown page with totals and one line per architecture and variant."""
    mapped = [r for r in rows if r.name not in VARIANTS]
    variants = [r for r in rows if r.name in VARIANTS]
    return "\n".join(
        [
            "# Coverage",
            "",
            "Made by `python tools/write_coverage.py`; `make test-slow` checks that every line still holds.",
            "",
            f"Every architecture that transformers {transformers.__version__} maps to a causal language model, as a "
            f"tiny random model (float32, CPU, torch {torch.__version__.split('+')[0]}). Its weights are drawn so that "
            "masking moves the logits visibly.",
            "",
            "- **found**: every matrix that is as wide as an FFN and takes part in a forward belongs to one that was "
            "found; *refused* tells what is left whole and why.",
            f"- **mask = slice**: {SPARSITY:.0%} of the channels of every FFN, chosen at random, masked and then cut: "
            f"logits differ by less than {TOLERANCE:g}. Masking moves them by more than {VISIBLE:g}, and so does "
            "cutting other channels (the control).",
            "- **gradients**: the gradient of the loss reaches the channels of every FFN.",
            "- **reload**: the cut model, saved and loaded by its stock class, gives the same logits; *with code*: the "
            "config cannot express the widths, so the modeling file saved beside the weights loads it; *refused*: "
            "nothing was written.",
            "",
            *_totals(mapped),
            "",
            HEAD,
            RULE,
            *(line(r) for r in mapped),
            "",
            "## Variants",
            "",
            "Layouts that the default configs do not reach.",
            "",
            HEAD,
            RULE,
            *(line(r) for r in variants),
            "",
        ]
    )


def line(row: Row) -> str:
    """One line of the table."""
    cells = (row.name, str(row.sites), row.layout or "–", row.found, row.cut, row.gradients, row.reload, row.why or "–")
    return f"| {' | '.join(c.replace('|', '/') for c in cells)} |"


def _totals(rows: Sequence[Row]) -> list[str]:
    def count(check: str, status: str) -> int:
        return sum(getattr(r, check) == status for r in rows)

    built = len(rows) - count("built", "failed")
    cut = [r for r in rows if r.sites]
    whole = sum(r.found == "ok" for r in cut)
    lines = [
        f"Of {len(rows)} architectures, {built} can be built; in {len(cut)} of them FFNs were found, in {whole} every "
        f"one of them ({sum(r.sites for r in cut)} FFNs in all).",
        "",
        "| check | ok | with code | refused, with the reason | failed |",
        "|---|---:|---:|---:|---:|",
    ]
    for title, check in (
        ("built", "built"),
        ("found", "found"),
        ("mask = slice", "cut"),
        ("gradients", "gradients"),
        ("reload", "reload"),
    ):
        numbers = (str(count(check, status)) for status in ("ok", "with code", "refused", "failed"))
        lines.append(f"| {title} | {' | '.join(numbers)} |")
    return lines
