"""The synset: its samples, its responses and its files."""
