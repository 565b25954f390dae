"""Training-data attribution for Hugging Face users: distilled datamodels with reverse gradient matching."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_rgm.registration import register_when_pipelines_load

if TYPE_CHECKING:
    from hf_rgm.attribution.attributor import Attributor
    from hf_rgm.attribution.pipeline import AttributionPipeline
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

_MODULES = {
    "AttributionPipeline": "attribution.pipeline",
    "AttributionResult": "results.result",
    "Attributor": "attribution.attributor",
    "ClusterMap": "clusters.cluster_map",
    "DistillationConfig": "distillation.config",
    "FidelityReport": "fidelity.report",
    "Objective": "engines.objectives",
    "ReverseGradientMatchingDistiller": "distillation.distiller",
    "Synset": "synset.synset",
    "Trajectory": "trajectory.trajectory",
    "TrajectoryCallback": "recording.callback",
}


def __getattr__(name: str) -> Any:
    # Public names are imported at their first use: the command line answers at once, and torch is loaded when needed.
    if name not in _MODULES:
        raise AttributeError(f"module 'hf_rgm' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"hf_rgm.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_pipelines_load()
