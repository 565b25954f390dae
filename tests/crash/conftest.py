from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.workers import Workers
from tests.hub.conftest import HubShell
from tests.hub_server import LocalHub


@pytest.fixture(scope="session")
def crash_hub() -> Iterator[LocalHub]:
    """The Hub that workers push to."""
    with LocalHub() as server:
        yield server
    assert not server.errors, server.errors[0]


@pytest.fixture(scope="session")
def workers(crash_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Processes to be killed; starting them takes seconds, once."""
    with Workers(HubShell(crash_hub, tmp_path_factory.mktemp("home")).environment()) as running:
        yield running
