"""`pipeline("data-attribution")`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from torch import nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.attribution.options import keywords_of, passes_options_to
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.memory_shares import DEFAULT_MEMORY
from hf_rgm.hub.artefact import CardOptions
from hf_rgm.hub.repository import is_repo_id, link_model, web_address
from hf_rgm.model.cost_estimates import CostEstimate
from hf_rgm.model.functional_model import LABEL_NAMES, main_input_name
from hf_rgm.model.losses import LossFunction
from hf_rgm.model.row_reader import as_rows, knows_words, padding_collator
from hf_rgm.model.warn_once import warn_once
from hf_rgm.results.mixture import MixtureSuggestion
from hf_rgm.results.result import AttributionResult
from hf_rgm.results.unlearned import UnlearnedModel
from hf_rgm.synset.synset import Synset
from hf_rgm.trajectory.trajectory import Trajectory

logger = logging.getLogger(__name__)

TASK = "data-attribution"
MODEL_CLASSES: tuple[Any, ...] = (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
)


class AttributionPipeline(Pipeline):
    """
    Which training data made the model do this.

    `pipeline("data-attribution", model=..., trajectory=..., rows=..., clusters=...)` where the training data is at
    hand, `pipeline("data-attribution", model=..., synset=...)` where a synset stands for it.

    Args:
        model (`PreTrainedModel`): The trained model (the `pipeline` factory also takes a folder or id).
        synset (`Synset`, `str` or `Path`, *optional*): The synset, its folder, or its repository on the Hub. Pass
            `Synset.from_pretrained(repo_id, revision=..., token=...)` for another revision or token than the default;
            those given to `pipeline` are the model's.
        trajectory, rows, clusters, row_loss (*optional*): The recorded run, the training dataset and its clusters; see
            [`Attributor`].
        max_memory (`str`, *optional*, defaults to `"4GB"`): Memory beside the model; see [`Attributor`].
        force (`bool`, *optional*, defaults to `False`): Accept a model whose parameters are not the synset's.
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bars.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): For token models: queries may then be strings, and
            queries and rows are padded by it where no `data_collator` is given. The `pipeline` factory takes it from
            the model's folder or repository; one that knows no words, as made up where there is none, is left out.
        kwargs: Options of [`AttributionPipeline.__call__`] that hold for every call, and what
            [`~transformers.Pipeline`] takes.

    Raises:
        ParameterMismatchError: If model and synset do not belong together.
        TypeError: If there is no such option, or the model is a plain module: [`Attributor`] takes those.

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
    _load_tokenizer = None  # if there is one

    def __init__(
        self,
        model,
        *,
        synset: Synset | str | Path | None = None,
        trajectory: str | Path | Trajectory | Sequence[str | Path | Trajectory] | None = None,
        rows: Any = None,
        clusters: ClusterMap | None = None,
        row_loss: LossFunction | None = None,
        max_memory: str = DEFAULT_MEMORY,
        force: bool = False,
        disable_tqdm: bool = False,
        **kwargs,
    ) -> None:
        if not hasattr(model, "device"):
            raise TypeError(
                f"`pipeline` takes models of transformers and PEFT, and {type(model).__name__} is a plain module. Use "
                "`hf_rgm.Attributor(model, ...)`: its `attribute`, `suggest_mixture`, `model_without` and "
                "`unlearn` do the same."
            )
        super().__init__(model, **kwargs)
        if self.tokenizer is not None and not knows_words(self.tokenizer):
            self.tokenizer = None
        collator = self._options.get("data_collator")
        if collator is None and self.tokenizer is not None and main_input_name(self.model) == "input_ids":
            collator = padding_collator(self.tokenizer)
        self.attributor = Attributor(
            self.model,
            synset,
            trajectory=trajectory,
            rows=rows,
            clusters=clusters,
            row_loss=row_loss,
            device=self.device,
            max_memory=max_memory,
            force=force,
            disable_tqdm=disable_tqdm,
            data_collator=collator,
        )
        self.attributor.tokenizer = self.tokenizer

    @property
    def synset(self) -> Synset:
        """The synset in use; raises a `ValueError` if the pipeline works by the training rows, without one."""
        if self.attributor.synset is None:
            raise ValueError(
                "This pipeline works by the training rows, without a synset. To share what it does, distil one with "
                "`ReverseGradientMatchingDistiller`, or save its results."
            )
        return self.attributor.synset

    @overload
    def __call__(self, queries: Any, *, top_k: None = None, **options: Any) -> AttributionResult: ...

    @overload
    def __call__(self, queries: Any, *, top_k: int, **options: Any) -> list[list[dict[str, Any]]]: ...

    @passes_options_to(Attributor.attribute)
    def __call__(
        self, queries: Any, *, top_k: int | None = None, **options: Any
    ) -> AttributionResult | list[list[dict[str, Any]]]:
        """
        Attributes all queries together.

        Args:
            queries: A dataset, a list of dictionaries, an iterable of them, one dictionary, or a dictionary of columns
                (`dataset[:3]`). With a tokenizer also one text or a list of texts, which get the labels that the model
                predicts, or rows with a `text`; they are no longer than the longest training row.
            top_k (`int`, *optional*): Return lists of the clusters with the largest scores in place of the matrix.
            options: Those of [`Attributor.attribute`]. `batch_size` and `num_workers`, which other pipelines take, are
                ignored.

        Returns:
            `AttributionResult`: one row of scores per query. With `top_k`, a list for each query instead; see
            [`AttributionResult.to_list`].
        """
        options = {**self._options, **options}
        for name in ("batch_size", "num_workers"):
            options.pop(name, None)
        preset = options.pop("top_k", None)
        top_k = preset if top_k is None else top_k
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}. Leave it out for the whole matrix.")
        result = self.attributor.attribute(self._as_rows(queries), **options)
        result.tokenizer = self.tokenizer  # type: ignore[assignment]
        return result if top_k is None else result.to_list(top_k)

    @passes_options_to(Attributor.estimate)
    def estimate(self, queries: Any, **options: Any) -> CostEstimate:
        """What attributing such queries will need; see [`Attributor.estimate`]."""
        return self.attributor.estimate(self._as_rows(queries), **options)

    @passes_options_to(Attributor.unlearn)
    def model_without(self, clusters: Iterable[str | int], **options: Any) -> nn.Module:
        """The model as it would be without some clusters; see [`Attributor.model_without`]."""
        return self.attributor.model_without(clusters, **options)

    @passes_options_to(Attributor.unlearn)
    def unlearn(self, clusters: Iterable[str | int], **options: Any) -> UnlearnedModel:
        """The model without some clusters, checked and ready to be shared; see [`Attributor.unlearn`]."""
        return self.attributor.unlearn(clusters, **options)

    @passes_options_to(Attributor.suggest_mixture)
    def suggest_mixture(self, queries: Any, **options: Any) -> MixtureSuggestion:
        """Which clusters to train on more, and which less; see [`Attributor.suggest_mixture`]."""
        return self.attributor.suggest_mixture(self._as_rows(queries), **options)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """
        Writes the model, with its tokenizer, to a folder and the synset, if there is one, to its subfolder `synset`.

        `pipeline("data-attribution", model=folder, synset=f"{folder}/synset")` loads them. Unlike other pipelines of
        libraries, it copies no code, so that nobody has to trust any.

        Args:
            save_directory (`str` or `Path`): The folder.
            kwargs: Those of the model's `save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)
        if self.attributor.synset is not None:
            self.synset.save_pretrained(Path(save_directory) / "synset", **self._reader_of_samples())

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        results: AttributionResult | None = None,
        results_repo_id: str | None = None,
        model_id: str | None = None,
        push_model: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        card: CardOptions | None = None,
        **options: Any,
    ) -> dict[str, str]:
        """
        Shares the synset and, if given, attributions: a dataset repository each, linked with each other and the model.

        The model's weights are not uploaded unless asked for; its card is only linked where the token may write to it.

        Args:
            repo_id (`str`): Repository of the synset, `"namespace/name"`.
            results (`AttributionResult`, *optional*): Attributions by this synset.
            results_repo_id (`str`, *optional*): Their repository. Defaults to `f"{repo_id}-attributions"`.
            model_id (`str`, *optional*): The trained model's repository. Defaults to where it was loaded from, unless
                its training started from there.
            push_model (`bool`, *optional*, defaults to `False`): Upload the model, and its tokenizer, to `model_id`.
            private (`bool`, *optional*): Whether repositories that are created are private.
            token (`str` or `bool`, *optional*): Defaults to that of `hf auth login`.
            revision (`str`, *optional*): Branch of each repository to commit to. Defaults to the main branch.
            create_pr (`bool`, *optional*, defaults to `False`): Open a pull request in each repository.
            card (`CardOptions`, *optional*): Licence, links or another template for the cards.
            options: Those of [`Synset.save_pretrained`], such as `state_precision`.

        Returns:
            `dict[str, str]`: addresses of `"synset"` and, where they are known, `"attributions"` and `"model"`.

        Raises:
            HfHubHTTPError: If the Hub refuses, for example because the token may not write.
            ValueError: If the results are of another model, or the model is to be pushed nowhere.
        """
        model_id = model_id or (card.model_id if card else None) or self._loaded_from()
        if push_model and model_id is None:
            raise ValueError("`push_model=True` needs a repository: pass `model_id`.")
        if results is not None and results.metadata.get("parameters_sha256") != self.synset.parameters_sha256:
            raise ValueError(
                "`results` were not computed by this pipeline's model and synset. Pass what calling it returned."
            )
        results_id = None if results is None else results_repo_id or f"{repo_id}-attributions"
        card = replace(
            card or CardOptions(), model_id=model_id, synset_id=repo_id, attribution_id=results_id, repo_id=None
        )
        shared: dict[str, Any] = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
        options = {**self._reader_of_samples(), **options}
        addresses = {"synset": str(self.synset.push_to_hub(repo_id, card=card, **shared, **options).repo_url)}
        if results is not None and results_id is not None:
            addresses["attributions"] = str(results.push_to_hub(results_id, card=card, **shared).repo_url)
        if push_model and model_id is not None:
            for part in (self.model, self.tokenizer):
                if part is not None:
                    part.push_to_hub(model_id, **shared)  # type: ignore[union-attr]
        if model_id is not None:
            links = {"synset": repo_id, "attribution": results_id}
            known = {name: value for name, value in links.items() if value}
            if link_model(model_id, known, token=token, revision=revision, create_pr=create_pr):
                addresses["model"] = web_address(model_id, "model")
        return addresses

    def _reader_of_samples(self) -> dict[str, Any]:
        """Where samples are texts, their table is written in words."""
        return {"tokenizer": self.tokenizer} if self.synset.metadata.get("tokens") is not None else {}

    def _loaded_from(self) -> str | None:
        """The repository the trained model was loaded from, if it was. Its training may have begun with another."""
        name = str(getattr(self.model.config, "name_or_path", ""))
        if name == self.synset.model_description.get("name_or_path"):
            return None
        return name if "/" in name and not Path(name).exists() and is_repo_id(name) else None

    def _as_rows(self, queries: Any) -> Any:
        if isinstance(queries, str):
            queries = [queries]
        elif isinstance(queries, Mapping):
            queries = as_rows(queries)
        elif isinstance(queries, Iterator):
            queries = list(queries)
        names = getattr(queries, "column_names", None)
        is_text = isinstance(queries, list) or (names is not None and "text" in names and "input_ids" not in names)
        return [self._tokenised(row) for row in queries] if self.tokenizer is not None and is_text else queries

    def _tokenised(self, row: Any) -> Any:
        if isinstance(row, str):
            row = {"text": row}
        if self.tokenizer is None or not isinstance(row, Mapping) or "input_ids" in row or "text" not in row:
            return row
        longest = self.attributor.subject.trajectory.longest_input
        tokens = self.tokenizer(row["text"], truncation=True)
        if longest is not None and len(tokens["input_ids"]) > longest:
            told = "Texts are cut to the %d tokens of the longest training row. Pass them tokenised to keep more."
            warn_once(logger, told, longest)
            tokens = self.tokenizer(row["text"], truncation=True, max_length=longest)
        keep = {*self.attributor.model.forward_arguments, *LABEL_NAMES}
        return {**{name: value for name, value in row.items() if name in keep}, **tokens}

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        # Called once, by the constructor of `Pipeline`, with the options it does not know.
        known = {"top_k", *keywords_of(Attributor.attribute)}
        if unknown := sorted(set(options) - known):
            raise TypeError(
                f"Unknown options: {', '.join(unknown)}. Those of every call are {', '.join(sorted(known))}."
            )
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


def register() -> None:
    """Makes `pipeline("data-attribution")` known; a second call changes nothing."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=AttributionPipeline,
            pt_model=MODEL_CLASSES,
            type="multimodal",
        )


register()
