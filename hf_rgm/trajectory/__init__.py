"""A recorded run: states, steps, the optimizer's rule, and the path through the states."""
