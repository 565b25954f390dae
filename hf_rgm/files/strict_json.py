"""Strict JSON: refuses what two readers could read differently, or Python could not write again."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

MAX_DEPTH = 50
_SHOWN = 40


def parse_json(text: str) -> Any:
    """
    Parses JSON; a `ValueError` if it is none or nested more than 50 deep, or has a key twice, NaN, infinity, a number
    beyond double precision or an integer beyond 64 bits.
    """
    try:
        content = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_in_64_bits,
            object_pairs_hook=_without_repeats,
        )
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        members = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for values in members for value in values if isinstance(value, (dict, list))]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:_SHOWN]} is too large a number")
    return number


def _in_64_bits(text: str) -> int:
    # Of more than 20 digits none fits, and Python's time is quadratic in their number.
    number = int(text) if len(text) <= 20 else None
    if number is None or not -(2**63) <= number < 2**64:
        raise ValueError(f"{text[:_SHOWN]} is too large an integer")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated[:_SHOWN]!r} is there twice")
    return content
