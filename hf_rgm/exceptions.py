"""Errors that have no standard Python name."""


class DivergenceError(RuntimeError):
    """A computation produced NaN, infinite or exploding values; its result was discarded."""


class ParameterMismatchError(ValueError):
    """A synset is used with a model whose trained parameters are not the ones it was distilled for."""
