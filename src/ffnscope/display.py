"""How results show themselves in a notebook: as a pandas DataFrame, or as an HTML table."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from ffnscope.errors import UsageError


def frame(columns: Mapping[str, list[Any]]) -> Any:
    """Build a pandas DataFrame; raises UsageError when pandas is not installed."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise UsageError("to_pandas() needs pandas: pip install pandas") from error
    return pandas.DataFrame(dict(columns))


def html_table(columns: Mapping[str, list[Any]]) -> str:
    """Small HTML table; numbers with four significant digits, None as a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))

    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = zip(*columns.values(), strict=True)
    body = "".join("<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
