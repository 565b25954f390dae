"""
A local Hub for the tests in this folder, and three ways to use the real client against it:

- `hub`: the server alone. The suite is offline, so the client of this process does not talk to it.
- `hub_in_process`: the server, and `huggingface_hub` and `datasets` of this process pointed at it and at empty caches.
  Enough for everything those two do, with and without an `endpoint` given, and for `from_pretrained` of transformers.
- `hub_shell`: Python code and commands in processes of their own, with the settings in their environment: for the `hf`
  command, for what reads its settings at import (the folder that transformers keeps remote code in, Xet's), for clean
  caches beyond doubt, and for processes that are to be killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets.config
import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import HfFileSystem, constants

from tests.hub_server import LocalHub

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """A Hub without repositories. Fails the test if the server broke or an injected fault met no request."""
    with LocalHub() as server:
        yield server
    assert not server.errors, server.errors[0]
    assert not server.faults.unused, f"no request met {server.faults.unused}"


@pytest.fixture
def hub_in_process(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """The Hub, which the client libraries in this process use, with the write token and with empty caches."""
    home = tmp_path / "hf_home"
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    # The functions of `huggingface_hub` are methods of one `HfApi`, which was given its endpoint at import.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    # So are those of transformers, at first use.
    monkeypatch.setattr(transformers.utils.hub.hf_api(), "endpoint", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "datasets"))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # File systems are kept by their arguments, and another test's Hub may have had the same port.
    HfFileSystem.clear_instance_cache()
    return hub


class HubShell:
    """
    Runs programs that use the Hub, each in a process of its own.

    Attributes:
        home (`Path`): the `HF_HOME` of the next process. Assign an empty folder for a clean cache.
    """

    def __init__(self, hub: LocalHub, folder: Path) -> None:
        self.hub, self.folder, self.home = hub, folder, folder / "hf_home"

    def environment(self, *, token: str | None = "", offline: bool = False) -> dict[str, str]:
        """The variables of such a process; `token=None` is nobody, and the default holds the write token."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        token = self.hub.token if token == "" else token
        return variables | {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_COLOR": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
            **({} if token is None else {"HF_TOKEN": token}),
        }

    def command(
        self, *command: str, token: str | None = "", offline: bool = False, env: Mapping[str, str] | None = None
    ) -> str:
        """
        Runs a command, found beside this Python first, in an own folder of the test.

        Returns:
            `str`: its standard output.

        Raises:
            `RuntimeError`: if it fails, with its standard error.
        """
        variables = self.environment(token=token, offline=offline) | dict(env or {})
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", "")])
        done = subprocess.run(
            command, env=variables, cwd=self.folder, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command[:2]} failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def python(
        self,
        code: str,
        *arguments: str,
        token: str | None = "",
        offline: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Runs Python code with `arguments` in `sys.argv[1:]`; otherwise like `command`."""
        return self.command(sys.executable, "-c", code, *arguments, token=token, offline=offline, env=env)


@pytest.fixture
def hub_shell(hub: LocalHub, tmp_path: Path) -> HubShell:
    """Processes that use `hub` with a cache of their own under `tmp_path`."""
    folder = tmp_path / "shell"
    folder.mkdir()
    return HubShell(hub, folder)
