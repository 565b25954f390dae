"""The callback that records a run, and what it needs of the Trainer."""
