"""All cases of folders that were tampered with."""

from __future__ import annotations

from typing import Any

from tests.hub.hostile.contradictions import cluster_maps, results, synsets, trajectories
from tests.hub.hostile.damage import any_json, any_table, any_tensors
from tests.hub.hostile.responses import responses

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "2**63": 2**63,
    "1e300": 1e300,
    "text": "text",
    "control characters": "\x1b[2J\ud800\u202e\n",
    "[]": [],
    "{}": {},
    "[[null]]": [[None]],
}
"""What every node of every JSON file is replaced by."""


CASES = [
    *any_json(),
    *any_tensors(),
    *any_table(),
    *cluster_maps(),
    *results(),
    *trajectories(),
    *synsets(),
    *responses(),
]
