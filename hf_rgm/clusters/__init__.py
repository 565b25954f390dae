"""The map from training rows to clusters."""
