"""Figures, sizes and ratios as text, and tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def figure(values: dict[str, Any], key: str) -> str:
    """A figure with its interval, and the number of queries without one."""
    if key not in values:
        return ""
    estimate = values[key]
    undefined = f" ({estimate['num_nan']} undefined)" if estimate["num_nan"] else ""
    interval = "" if estimate["low"] is None else f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{estimate['value']:.3f}{interval}{undefined}"


def size(num_bytes: float | None) -> str:
    """Bytes as kB or MB."""
    if num_bytes is None:
        return ""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.0f} kB"


def ratio(value: float | None) -> str:
    """A cost relative to a training, two digits."""
    return "" if value is None else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def signless(value: float) -> str:
    """Two decimals; a rounding error about 0 has no sign, which would change between machines."""
    return f"{round(value, 2) + 0.0:.2f}"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or nothing if there are no rows."""
    if not rows:
        return ""
    lines = [" | ".join(titles), "|".join("---" for _ in titles), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if index != 1 else f"|{line}|" for index, line in enumerate(lines))
