"""
Kills processes many times, and checks after each kill that nothing is lost or half-written:

    python -m tests.crash --kills 200 [--model vit] [--seed 0] [--only recording]

Every line it prints is a campaign of `tests/crash/campaigns.py` with this many kills. A violation ends the program
with its `AssertionError`. The test suite runs the same campaigns with a few kills each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.crash.campaigns import (
    Plan,
    at_every_operation,
    at_random_times,
    distilling,
    pushing,
    recording,
    saving,
)
from tests.crash.models import MODELS
from tests.crash.tasks import KINDS
from tests.crash.workers import Workers
from tests.hub.conftest import HubShell
from tests.hub_server import LocalHub


def campaigns(workers: Workers, hub: LocalHub, seed: int) -> Iterator[tuple[str, Callable[..., int], Plan | None]]:
    """Name, campaign and plan of each."""
    plans: dict[str, Callable[[], Plan]] = {
        "at every file operation": at_every_operation,
        "at random times": lambda: at_random_times(seed),
    }
    for when, plan in plans.items():
        for best in (None, "first", "last"):
            yield f"recording, best checkpoint {best}, {when}", partial(recording, workers, best=best), plan()
        yield f"distilling, {when}", partial(distilling, workers), plan()
        for kind in KINDS:
            for way, options in {"": {}, " first": {"first": True}, " by renames": {"exchange": False}}.items():
                yield f"saving {kind}{way}, {when}", partial(saving, workers, kind=kind, **options), plan()
    for kind in ("synset", "result", "unlearned"):
        yield f"pushing {kind}, at every request", partial(pushing, workers, hub, kind=kind), None
        yield f"pushing {kind}, at random times", partial(pushing, workers, hub, kind=kind), at_random_times(seed)


def main() -> None:
    """Runs all campaigns and tells of each how many workers were killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description="Kills processes that write.")
    parser.add_argument("--kills", type=int, default=200, help="of each campaign")
    parser.add_argument("--model", choices=MODELS, default="tiny", help="what is trained, distilled and unlearned")
    parser.add_argument("--seed", type=int, default=0, help="of random times")
    parser.add_argument("--only", default="", help="campaigns whose name contains this")
    options = parser.parse_args()
    total = 0
    with tempfile.TemporaryDirectory() as folder, LocalHub() as hub:
        home = Path(folder)
        with Workers(HubShell(hub, home).environment(), options.model) as workers:
            for number, (name, campaign, plan) in enumerate(campaigns(workers, hub, options.seed)):
                if options.only not in name:
                    continue
                start = time.perf_counter()
                killed = campaign(home / str(number), plan, options.kills)
                sys.stdout.write(f"{name}: {killed} killed, {time.perf_counter() - start:.0f} s\n")
                sys.stdout.flush()
                total += killed
    sys.stdout.write(f"{options.model}: {total} killed in all, and nothing was lost\n")


if __name__ == "__main__":
    main()
