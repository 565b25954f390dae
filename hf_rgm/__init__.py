"""Training-data attribution for Hugging Face users: distilled datamodels with reverse gradient matching."""

__version__ = "0.1.0.dev0"

__all__: list[str] = []
