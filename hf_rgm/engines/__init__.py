"""Engines: from a recorded run to its models, or the effects of its rows, under other cluster weights."""
