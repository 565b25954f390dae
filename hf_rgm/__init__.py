"""Training-data attribution for Hugging Face users: distilled datamodels with reverse gradient matching."""

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.attribution.pipeline import AttributionPipeline, register
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.distillation.distiller import ReverseGradientMatchingDistiller
from hf_rgm.engines.objectives import Objective
from hf_rgm.fidelity.report import FidelityReport
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.results.result import AttributionResult
from hf_rgm.synset.synset import Synset
from hf_rgm.trajectory.trajectory import Trajectory

__version__ = "0.1.0.dev0"

__all__ = [
    "AttributionPipeline",
    "AttributionResult",
    "Attributor",
    "ClusterMap",
    "DistillationConfig",
    "FidelityReport",
    "Objective",
    "ReverseGradientMatchingDistiller",
    "Synset",
    "Trajectory",
    "TrajectoryCallback",
]

register()
