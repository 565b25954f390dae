"""The linear datamodeling score as an `evaluate` module."""

from hf_rgm.fidelity.modules.linear_datamodeling_score.linear_datamodeling_score import LinearDatamodelingScore

__all__ = ["LinearDatamodelingScore"]
