"""Keeps every test offline, quiet and on one thread. The environment is set before the libraries read it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest  # noqa: E402
import torch  # noqa: E402

from hf_rgm.model.warn_once import warn_once  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _warnings_are_said_again():
    """No test depends on what those before it were warned of."""
    warn_once.cache_clear()
