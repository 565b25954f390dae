"""Self-contained pages that show attributions."""
