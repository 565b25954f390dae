"""Warnings that are said once, whatever the number of rows, runs and questions."""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_once(logger: logging.Logger, message: str, *args: object) -> None:
    """Logs a warning unless the same one, with the same arguments, was logged before in this process."""
    logger.warning(message, *args)
