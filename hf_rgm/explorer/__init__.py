"""The explorer, an app around the pages."""
