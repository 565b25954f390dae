"""A Hub for tests, on 127.0.0.1 with the standard library: enough for the clients hf_rgm meets."""

from .server import LocalHub

__all__ = ["LocalHub"]
