"""Recording a training run: parameters, optimizer moments, learning rates and the rows of every step."""

from hf_rgm.trajectory.callback import TrajectoryCallback
from hf_rgm.trajectory.fingerprint import dataset_fingerprint
from hf_rgm.trajectory.optimizers import Moments, OptimizerRule, ParameterGroup, Parameters, apply_update
from hf_rgm.trajectory.storage import StepTable, Trajectory, TrajectoryState

__all__ = [
    "Moments",
    "OptimizerRule",
    "ParameterGroup",
    "Parameters",
    "StepTable",
    "Trajectory",
    "TrajectoryCallback",
    "TrajectoryState",
    "apply_update",
    "dataset_fingerprint",
]
