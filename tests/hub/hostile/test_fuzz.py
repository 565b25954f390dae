"""The first mutated folders of every loader; `python -m tests.hub.hostile.fuzz` tries more of them."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tests.hub.hostile.fuzz import LOADERS, Fuzzer

EXAMPLES = 300
FOUND = {"blocks": [1022, 2133, 3507], "scores": [1, 85, 345, 28499, 29072]}
"""Numbers of examples in which minutes of fuzzing found something that is mended."""


@pytest.mark.parametrize("name", LOADERS)
def test_mutated_folders_load_or_are_refused(name, tmp_path):
    fuzzer = Fuzzer(name, tmp_path / "scratch")
    outcomes = Counter(fuzzer.check(number, seconds=math.inf) for number in (*range(EXAMPLES), *FOUND.get(name, ())))
    assert outcomes["loads"] and outcomes.total() > outcomes["loads"]
