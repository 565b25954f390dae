"""`pipeline("data-attribution")`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.attribution.mixture import MixtureSuggestion
from hf_rgm.attribution.result import AttributionResult
from hf_rgm.synset.synset import Synset

TASK = "data-attribution"
MODEL_CLASSES: tuple[Any, ...] = (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
)


class AttributionPipeline(Pipeline):
    """
    Which training data made the model do this: `pipeline("data-attribution", model=..., synset=...)`.

    Args:
        model (`PreTrainedModel`): The trained model (the `pipeline` factory also takes a folder or id).
        synset (`Synset`, `str` or `Path`): The synset, or its folder.
        force (`bool`, *optional*, defaults to `False`): Accept a model whose parameters are not the synset's.
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bars.
        kwargs: Options of [`AttributionPipeline.__call__`] that hold for every call, and what
            [`~transformers.Pipeline`] takes.

    Raises:
        ParameterMismatchError: If model and synset do not belong together.

    Example:

    ```python
    >>> import hf_rgm
    >>> from transformers import pipeline
    >>> from hf_rgm.testing import tiny_recorded_run, tiny_synset
    >>> run = tiny_recorded_run()
    >>> attribute = pipeline("data-attribution", model=run.model, synset=tiny_synset(), disable_tqdm=True)
    >>> result = attribute(run.queries)
    >>> result.scores.shape == (len(run.queries), run.clusters.num_clusters)
    True

    ```
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(
        self,
        model,
        *,
        synset: Synset | str | Path,
        force: bool = False,
        disable_tqdm: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(model, **kwargs)
        self.attributor = Attributor(self.model, synset, device=self.device, force=force, disable_tqdm=disable_tqdm)

    @property
    def synset(self) -> Synset:
        """The synset in use."""
        return self.attributor.synset

    def __call__(self, queries: Any, **options: Any) -> AttributionResult:
        """
        Attributes all queries together.

        Args:
            queries: A dataset, a list of dictionaries, an iterable of them, or one dictionary.
            options: Those of [`Attributor.attribute`]: `engine`, `objective`, `rows`, `data_collator`, `rewind`,
                `stride`, `num_masks`, `seed`, `query_ids`. `batch_size` and `num_workers`, which pipelines take, do
                not change the result and are ignored.

        Returns:
            `AttributionResult`: one row of scores per query.
        """
        options = {**self._options, **options}
        for name in ("batch_size", "num_workers"):
            options.pop(name, None)
        return self.attributor.attribute(_as_sequence(queries), **options)

    def model_without(self, clusters: Iterable[str | int], **options: Any) -> nn.Module:
        """The model as it would be without some clusters; see [`Attributor.model_without`]."""
        return self.attributor.model_without(clusters, **options)

    def suggest_mixture(self, queries: Any, **options: Any) -> MixtureSuggestion:
        """Which clusters to train on more, and which less; see [`Attributor.suggest_mixture`]."""
        return self.attributor.suggest_mixture(_as_sequence(queries), **options)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        # Called once, by the constructor of `Pipeline`, with the options it does not know.
        self._options = options
        return {}, options, {}

    def preprocess(self, input_: Any, **_: Any) -> Any:
        """Part of the interface of `Pipeline`: queries are collated together in [`AttributionPipeline.__call__`]."""
        return input_

    def _forward(self, input_tensors: Any, **options: Any) -> AttributionResult:
        return self.attributor.attribute([input_tensors], **options)

    def postprocess(self, model_outputs: AttributionResult, **_: Any) -> AttributionResult:
        """Part of the interface of `Pipeline`: results are complete as they are."""
        return model_outputs


def _as_sequence(queries: Any) -> Any:
    if isinstance(queries, dict):
        return [queries]
    return list(queries) if isinstance(queries, Iterator) else queries


def register() -> None:
    """Makes `pipeline("data-attribution")` known; a second call changes nothing."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=AttributionPipeline,
            pt_model=MODEL_CLASSES,
            type="multimodal",
        )
