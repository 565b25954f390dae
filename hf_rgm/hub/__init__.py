"""Cards of what is shared."""
