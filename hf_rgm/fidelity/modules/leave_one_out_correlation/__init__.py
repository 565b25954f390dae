"""The leave-one-out correlation as an `evaluate` module."""

from hf_rgm.fidelity.modules.leave_one_out_correlation.leave_one_out_correlation import LeaveOneOutCorrelation

__all__ = ["LeaveOneOutCorrelation"]
