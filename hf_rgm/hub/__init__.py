"""Sharing artefacts: repositories on the Hub and their cards."""

from hf_rgm.hub.artefact import CardOptions

__all__ = ["CardOptions"]
