"""
Writes the README's tables from the JSON files under benchmarks/results/.

    python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.run import RESULTS

README = Path(__file__).parents[1] / "README.md"
COLUMNS = {"leave_cluster_out": "leave-cluster-out", "lds_clusters": "LDS clusters", "lds_rows": "LDS rows"}


def cell(values: dict, key: str) -> str:
    """A figure with its interval."""
    if key not in values:
        return ""
    estimate = values[key]
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def table(report: dict) -> str:
    """The Markdown table of one task."""
    lines = [
        f"| {report['task']}, {report['num_queries']} queries | {' | '.join(COLUMNS.values())} | offline / training | "
        "online / training |",
        "|---|" + "---|" * (len(COLUMNS) + 2),
        f"| *noise ceiling* | {' | '.join(cell(report['noise_ceiling'], key) for key in COLUMNS)} | | |",
    ]
    for name, values in report["methods"].items():
        cells = " | ".join(cell(values, key) for key in COLUMNS)
        offline, online = values["offline_over_training"], values["online_over_training"]
        lines.append(f"| {name} | {cells} | {offline:.1f} | {online:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        begin, end = f"<!-- {path.stem}:begin -->", f"<!-- {path.stem}:end -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = re.sub(pattern, lambda _: f"{begin}\n{table(report)}\n{end}", text, flags=re.DOTALL)  # noqa: B023
    README.write_text(text, encoding="utf-8")
