"""Retraining on subsets, and how well answers agree with it."""
