"""Registration of the task `data-attribution` with transformers, without importing transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PIPELINES = "transformers.pipelines"
OURS = "hf_rgm.attribution.pipeline"  # registers the task at its end


def register_when_pipelines_load() -> None:
    """Registers the task now if `transformers.pipelines` is loaded, else as soon as it is."""
    if PIPELINES in sys.modules:
        importlib.import_module(OURS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds `transformers.pipelines` as others do, and lets its loader import our pipeline after it."""

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != PIPELINES:
            return None
        sys.meta_path.remove(self)  # or it would find itself
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            load = loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                importlib.import_module(OURS)

            loader.exec_module = load_and_register
        return spec
