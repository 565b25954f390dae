"""Recording a training run: parameters, optimizer moments, learning rates and the rows of every step."""
