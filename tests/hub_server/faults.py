"""Things that go wrong on purpose: refusals, broken connections, lost answers, and changes between two requests."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Fault:
    """
    What happens to requests whose `"METHOD /path"` (percent-decoded, without the query) matches `pattern`.

    Args:
        pattern (`str`): regular expression, searched for.
        kind: `"fail"` answers `status`; `"drop"` closes the connection half-way through the request's body, or through
            the answer's where the request has none; `"lose"` does what was asked and closes without an answer;
            `"before"` calls `action` and then goes on as usual.
        times (`int`, *optional*): how many requests it meets; every one if `None`.
        skip (`int`): how many matching requests pass unharmed first.
    """

    pattern: str
    kind: Literal["fail", "drop", "lose", "before"]
    times: int | None = 1
    skip: int = 0
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    action: Callable[[], object] | None = None


class Faults:
    """The faults in force; each request takes at most one, the first that fits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, line: str) -> Fault | None:
        """The fault that meets the request `line`, counted as used."""
        with self._lock:
            for fault in self._faults:
                if fault.times == 0 or not re.search(fault.pattern, line):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    @property
    def unused(self) -> list[Fault]:
        """Faults that still wait for a request: at the end of a test, a sign that it did not test what it says."""
        with self._lock:
            return [fault for fault in self._faults if fault.times]
