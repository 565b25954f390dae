"""Attribution methods behind one interface, `Method`; one module for each family."""

from __future__ import annotations

from benchmarks.methods import ours
from benchmarks.recorded import Method

METHODS: dict[str, Method] = {**ours.METHODS}

ABLATIONS: dict[str, Method] = {**ours.ABLATIONS}
