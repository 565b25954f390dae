"""`python -m tests.hub_server` says how to use it, serves, and stops on Ctrl-C."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

ROOT = Path(__file__).parents[2]


def test_it_serves_until_ctrl_c(hub_in_process):
    """The fixture only lets this process ask a Hub at all."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hub_server"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = "".join(process.stdout.readline() for _ in range(4))
        found = re.search(r"HF_ENDPOINT=(\S+) HF_TOKEN=(\S+)", said)
        assert found, said
        api = HfApi(endpoint=found[1], token=found[2])
        assert api.whoami()["name"] == "me" and "me/my-synset" in said
        api.create_repo("me/my-synset", repo_type="dataset")
        assert api.repo_exists("me/my-synset", repo_type="dataset")
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
        assert (process.returncode, out, error) == (0, "Stopped.\n", "")
    finally:
        process.kill()
        process.wait()
    with pytest.raises(Exception, match="refused"):
        api.whoami()
