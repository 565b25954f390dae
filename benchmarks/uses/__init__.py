"""What attributions are good for, measured by retraining: mislabelled rows, brittle predictions, better mixtures."""
