"""Attribution: questions about a model's training data, and their answers."""
