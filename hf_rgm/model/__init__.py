"""A user's model, loss and rows as functions of tensors."""
