"""Digest of what a user's function does: its code, and the values and functions that it refers to."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type(...))


def code_digest(function: Any) -> str:
    """SHA-256 over code, defaults, closures, referenced globals and attributes, however deep; not over file names."""
    digest = hashlib.sha256()
    _feed(digest, function, {})
    return digest.hexdigest()


def _feed(digest: Any, value: Any, seen: dict[int, Any]) -> None:
    if isinstance(value, _PLAIN):
        digest.update(f"{type(value).__name__}{value!r}".encode())
        return
    digest.update(f"{type(value).__module__}.{type(value).__qualname__}".encode())
    if id(value) in seen:
        return
    seen[id(value)] = value  # alive, so that its id stays its own
    members: list[Any] = []
    if isinstance(value, types.ModuleType):
        digest.update(value.__name__.encode())
    elif isinstance(value, Tensor | np.ndarray | np.generic):
        array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else np.asarray(value)
        digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    elif isinstance(value, types.CodeType):
        digest.update(value.co_code)
        members = [value.co_names, value.co_consts]
    elif isinstance(value, types.FunctionType):
        members = [value.__code__, value.__defaults__, value.__kwdefaults__, *_referred(value)]
    elif isinstance(value, types.MethodType):
        members = [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        members = [value.func, value.args, value.keywords]
    elif isinstance(value, type):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
        own = not value.__module__.startswith(("torch", "transformers", "datasets", "numpy", "builtins"))
        methods = [item for _, item in sorted(vars(value).items()) if isinstance(item, types.FunctionType)]
        members = methods if own else []
    elif isinstance(value, Mapping):
        members = [item for pair in sorted(value.items(), key=lambda pair: repr(pair[0])) for item in pair]
    elif isinstance(value, set | frozenset):
        members = sorted(value, key=repr)
    elif isinstance(value, list | tuple):
        members = [len(value), *value]
    elif callable(value) and hasattr(value, "__dict__"):
        members = [type(value), vars(value)]
    for member in members:
        _feed(digest, member, seen)


def _referred(function: types.FunctionType) -> list[Any]:
    """Values of the closure, and of the globals that a function and those defined in it name."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    names, waiting = set(), [function.__code__]
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        waiting.extend(inner for inner in code.co_consts if isinstance(inner, types.CodeType))
    scope = function.__globals__
    own = function.__module__.partition(".")[0] not in ("torch", "transformers", "datasets", "numpy")
    return [*cells, *([item for name in sorted(names & scope.keys()) for item in (name, scope[name])] if own else [])]


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises if it is not)
    except ValueError:
        return False
    return True
