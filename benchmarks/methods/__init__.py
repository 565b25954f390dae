"""Attribution methods behind one interface, `Method`; one module for each family."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.methods import baselines, ours, paper
from benchmarks.peers import PEERS
from benchmarks.recorded import Entrant, Method

DEAR = ("dattri influence, CG",)
"""Methods with dear queries: see `Task.num_dear_queries`."""


def _family(family: str, methods: Mapping[str, Method | Mapping[str, Method]]) -> dict[str, Entrant]:
    return {
        name: Entrant(name, family, {"": method} if callable(method) else method, dear=name in DEAR)
        for name, method in methods.items()
    }


METHODS: dict[str, Entrant] = {
    **_family("ours", ours.METHODS),
    **_family("the paper's plain forms", paper.METHODS),
    **_family("baselines", baselines.METHODS),
    **_family("peers", PEERS),
}

ABLATIONS: dict[str, Entrant] = _family("ablations", ours.ABLATIONS)
