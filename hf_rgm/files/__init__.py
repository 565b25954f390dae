"""Writing so that nothing is half there, and reading what need not be trusted."""
