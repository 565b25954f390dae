"""
Other attribution libraries behind one interface, each with its small grid of settings.

A peer is reported with the setting that does best on the tuning queries. How to install them:
`benchmarks.peers.common.INSTALL`.
"""

from __future__ import annotations

from benchmarks.peers.captum_tracin import tracin
from benchmarks.peers.dattri_dvemb import dvemb
from benchmarks.peers.dattri_influence import conjugate_gradients
from benchmarks.peers.kronfluence_ekfac import ekfac
from benchmarks.peers.trak import trak
from benchmarks.recorded import Method


def _trak_grid(num_models: int) -> dict[str, Method]:
    settings = [(1024, 30.0), (1024, 100.0), (1024, 300.0), (2048, 100.0), (2048, 300.0), (2048, 1000.0)]
    return {
        f"dimension {dimension}, regularization {value:g}": trak(
            num_models, regularization=value, projection_dimension=dimension
        )
        for dimension, value in settings
    }


PEERS: dict[str, dict[str, Method]] = {
    "captum TracInCP": {"all states": tracin(), "4 states": tracin(4), "last state": tracin(1)},
    "kronfluence EK-FAC": {
        "damping by heuristic": ekfac(None),
        **{f"damping {value:g}": ekfac(value) for value in (1e-8, 1e-5, 1e-4)},
    },
    "dattri influence, CG": {
        **{f"regularization {value:g}": conjugate_gradients(value) for value in (0.03, 0.1, 0.3)},
        "regularization 0.1, 20 iterations": conjugate_gradients(0.1, num_iterations=20),
    },
    "dattri DVEmb": {"as it comes": dvemb()},
    "dattri DVEmb, preconditioned by us": {f"{which} second moments": dvemb(which) for which in ("final", "mean")},
    "TRAK, 1 model": _trak_grid(1),
    "TRAK, 5 models": _trak_grid(5),
}
