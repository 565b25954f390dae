"""Modules for the `evaluate` library: importable, and loadable by the path of their folder."""
