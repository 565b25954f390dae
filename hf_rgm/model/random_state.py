"""Global random states, kept as they are while rows are read that may be augmented or masked at random."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator

import numpy as np
import torch


@contextlib.contextmanager
def random_state_kept(seed: int | None = None, *, devices: Collection[int] = ()) -> Iterator[None]:
    """A block after which Python, numpy and torch (and CUDA `devices`) draw on as before; in it, from `seed`."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
