"""Questions about a model's training data, and their answers."""
