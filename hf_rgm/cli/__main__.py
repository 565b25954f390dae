"""`python -m hf_rgm.cli`, for launchers that start a module."""

from hf_rgm.cli import app

if __name__ == "__main__":
    app()
