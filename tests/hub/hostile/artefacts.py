"""The four kinds of artefacts: how tests write, load and use one, and what must be true of all that loads."""

from __future__ import annotations

import functools
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_rgm import AttributionResult, Attributor, ClusterMap, Synset, Trajectory
from hf_rgm.exceptions import DivergenceError
from hf_rgm.files.reading import ArtefactFolder
from hf_rgm.results.result_files import attribution_card
from hf_rgm.synset.synset_files import synset_card
from hf_rgm.testing import tiny_recorded_run, tiny_synset

REFUSALS = (ValueError, FileNotFoundError, MemoryError)
"""What loading may raise, and no subclasses of other meaning; see `is_refusal`."""

ENGINES = ("linearized_replay", "adjoint", "replay")


def is_refusal(error: BaseException) -> bool:
    """Whether an error is one that `from_pretrained` announces, in our words and without control characters."""
    foreign = type(error).__module__.split(".")[0] not in ("builtins", "hf_rgm")
    return isinstance(error, REFUSALS) and not foreign and is_plain(str(error))


def is_plain(text: str) -> bool:
    """Whether a terminal shows the text as it is."""
    return not any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in text.replace("\n", ""))


def example_result() -> AttributionResult:
    rng = np.random.default_rng(0)
    ids = np.arange(12) % 3
    return AttributionResult(
        scores=rng.normal(size=(2, 3)),
        cluster_names=["imdb", "yelp", "news"],
        cluster_sizes=np.bincount(ids),
        query_ids=["a", "b"],
        objective="margin",
        objective_values=np.ones(2),
        engine="adjoint",
        row_scores=rng.normal(size=(2, 12)),
        cluster_ids=ids,
        metadata={"model": {"class": "TinyModel", "name_or_path": "me/model"}, "num_runs": 1},
    )


def example_map() -> ClusterMap:
    whole = ClusterMap.from_ids(np.arange(12) % 3, names=["imdb", "yelp", "news"])
    return whole.refine("yelp", ids=[0, 1, 0, 1])


def look_at_synset(synset: Synset) -> None:
    assert is_plain(repr(synset)) and is_plain(repr(synset.clusters)) and is_plain(repr(synset.trajectory))
    if synset.responses is not None:
        assert synset.responses.decode().isfinite().all()
    assert is_plain(synset_card(synset)) and is_plain(synset.to_pandas().to_string())


def look_at_result(result: AttributionResult) -> None:
    assert is_plain(repr(result)) and is_plain(result.top(3).to_string()) and is_plain(result.to_pandas().to_string())
    assert is_plain(attribution_card(result)) and is_plain(f"{result.objective} {result.engine}")


def look_at_trajectory(trajectory: Trajectory) -> None:
    assert is_plain(repr(trajectory)) and len(trajectory.update_numbers) == trajectory.num_steps


def look_at_map(clusters: ClusterMap) -> None:
    assert is_plain(repr(clusters)) and clusters.sizes.sum() == clusters.num_rows
    if clusters.parents is not None:
        clusters.coarsen()


def attribute(synset: Synset) -> list[str]:
    """What each engine makes of a synset: `"scores"`, or the type of an error that says what is wrong."""
    run = tiny_recorded_run()
    outcomes = []
    for engine in ENGINES:
        try:
            Attributor(run.model, synset, disable_tqdm=True).attribute(run.queries.select(range(2)), engine=engine)
            outcomes.append("scores")
        except (DivergenceError, ValueError, NotImplementedError, FileNotFoundError) as error:
            assert is_plain(str(error))
            outcomes.append(type(error).__name__)
    return outcomes


@dataclass(frozen=True)
class Artefact:
    """
    A kind of artefact.

    Args:
        name (`str`): Its class.
        marker (`str`): The file that every such folder has.
        make (`Callable`): Writes an example to a folder.
        read (`Callable`): Reads it from an `ArtefactFolder`, local or on the Hub.
        look (`Callable`): What a user may do to see what was read.
        save (`Callable`): Saves it to a folder.
    """

    name: str
    marker: str
    make: Callable[[Path], Any]
    read: Callable[[ArtefactFolder], Any]
    look: Callable[[Any], None]
    save: Callable[[Any, Path], object]

    @functools.cached_property
    def pristine(self) -> Path:
        """A folder that nobody has touched; copy it."""
        folder = Path(tempfile.mkdtemp(prefix="hf-rgm-hostile-")) / self.name
        self.make(folder)
        return folder


def _read_synset(folder: ArtefactFolder) -> Synset:
    return Synset.from_pretrained(folder)  # type: ignore[arg-type]


def _read_result(folder: ArtefactFolder) -> AttributionResult:
    return AttributionResult.from_pretrained(folder)  # type: ignore[arg-type]


ARTEFACTS = {
    artefact.name: artefact
    for artefact in (
        Artefact(
            "Synset",
            "synset.json",
            lambda folder: tiny_synset().save_pretrained(folder),
            _read_synset,
            look_at_synset,
            Synset.save_pretrained,
        ),
        Artefact(
            "AttributionResult",
            "attribution.json",
            lambda folder: example_result().save_pretrained(folder),
            _read_result,
            look_at_result,
            AttributionResult.save_pretrained,
        ),
        Artefact(
            "Trajectory",
            "trajectory.json",
            lambda folder: tiny_recorded_run().trajectory.save(folder),
            Trajectory.load,
            look_at_trajectory,
            Trajectory.save,
        ),
        Artefact(
            "ClusterMap",
            "clusters.json",
            lambda folder: example_map().save(folder),
            ClusterMap.load,
            look_at_map,
            ClusterMap.save,
        ),
    )
}
