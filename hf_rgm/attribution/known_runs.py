"""The recorded runs that are asked about, with the rows of a question, and all that is known of them already."""

from __future__ import annotations

from typing import Any

from hf_rgm.attribution.subject import Subject
from hf_rgm.engines.gradient_sources import RowSource, SampleSource, training_rows
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.engines.recorded_run import RecordedRun
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import RowLoss
from hf_rgm.model.processes import Processes
from hf_rgm.model.row_reader import DataCollator, RowReader
from hf_rgm.synset.synset import Synset
from hf_rgm.trajectory.path import states_by_epochs
from hf_rgm.trajectory.trajectory import Trajectory


class KnownRuns:
    """
    Gives the recorded runs to every question; gradients and curvature stay while the rows stay the same.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        subject (`Subject`): The runs.
        synset (`Synset`, *optional*): The synset, if there is one.
        samples (`SampleSource`, *optional*): Its samples.
        row_loss (`RowLoss`): The loss of a row.
        max_bytes (`int`): Memory beside the recorded states.
        processes (`Processes`): Among which work is split.
        disable_tqdm (`bool`): No progress bars.
    """

    def __init__(
        self,
        model: FunctionalModel,
        subject: Subject,
        synset: Synset | None,
        samples: SampleSource | None,
        row_loss: RowLoss,
        *,
        max_bytes: int,
        processes: Processes,
        disable_tqdm: bool,
    ) -> None:
        self._model = model
        self._subject = subject
        self._synset = synset
        self._samples = samples
        self._row_loss = row_loss
        self._max_bytes = max_bytes // len(subject.trajectories)
        self._processes = processes
        self._disable_tqdm = disable_tqdm
        self._known: tuple[Any, DataCollator | None, list[RecordedRun]] | None = None

    def of(self, rows: Any, collator: DataCollator | None) -> list[RecordedRun]:
        """
        The runs with these rows: those of the last call, with all they know, if it had the same.

        Args:
            rows: The training dataset, or `None`.
            collator (`Callable`, *optional*): Collates it.

        Raises:
            ValueError: If they are other rows, or the synset has a loss that `row_loss` lacks.
        """
        if self._known is not None and self._known[0] is rows and (rows is None or self._known[1] is collator):
            return self._known[2]
        reader = None
        if rows is not None:
            synset = self._synset
            if synset is not None and synset.metadata.get("custom_row_loss") and self._row_loss.function is None:
                raise ValueError(
                    "The synset was distilled with a `row_loss` of its own, which rows are scored by. Pass the same "
                    "function as `row_loss`."
                )
            trajectory = self._subject.trajectory
            reader = training_rows(rows, self._model, self._subject.clusters, collator, trajectory)
            trajectory.check_dataset(rows, what="rows")
        runs = [self._run(trajectory, reader) for trajectory in self._subject.trajectories]
        self._known = rows, collator, runs
        return runs

    def _run(self, trajectory: Trajectory, reader: RowReader | None) -> RecordedRun:
        rows = None
        if reader is not None:
            rows = RowSource(
                self._model,
                reader,
                self._subject.clusters,
                self._row_loss,
                max_bytes=MemoryShares.of(self._max_bytes, with_rows=True).kept,
                processes=self._processes,
            )
        return RecordedRun(
            self._model,
            trajectory,
            self._subject.clusters,
            samples=self._samples,
            rows=rows,
            responses=None if self._synset is None else self._synset.responses,
            max_states=states_by_epochs(trajectory),
            max_bytes=self._max_bytes,
            processes=self._processes,
            disable_tqdm=self._disable_tqdm,
        )
