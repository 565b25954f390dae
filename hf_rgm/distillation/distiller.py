"""Learns a synset from a recorded trajectory by reverse gradient matching."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.distillation.blocks import BlockStore
from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.distillation.initialisation import initial_samples
from hf_rgm.distillation.learner import BlockLearner
from hf_rgm.distillation.memory_plan import MemoryPlan, measure_match, plan_memory
from hf_rgm.distillation.privacy import measure_privacy
from hf_rgm.distillation.sketch import CountSketch
from hf_rgm.distillation.stopping import LEAST_ROUNDS, round_lengths
from hf_rgm.engines.gradient_form import WholeGradients
from hf_rgm.engines.gradient_sources import RowSource
from hf_rgm.engines.kept_responses import compute_responses
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.engines.recorded_run import RecordedRun
from hf_rgm.engines.row_scores import rows_identity
from hf_rgm.model.cost_estimates import CostEstimate
from hf_rgm.model.functional_model import FunctionalModel, parameters_sha256
from hf_rgm.model.losses import LossFunction
from hf_rgm.model.out_of_memory import advice_on_memory
from hf_rgm.model.processes import Processes
from hf_rgm.model.row_gradients import cluster_gradients, measure_rows
from hf_rgm.model.row_reader import CachedBatches, DataCollator, RowReader
from hf_rgm.model.synthetic_inputs import check_distillable
from hf_rgm.synset.compatibility import check_runs, open_runs, row_loss_of, warn_unless_matched
from hf_rgm.synset.inputs import input_space
from hf_rgm.synset.matched_states import StateVectors, matched_states
from hf_rgm.synset.responses import Responses
from hf_rgm.synset.samples import SynsetGradients, SyntheticSamples
from hf_rgm.synset.synset import Synset
from hf_rgm.trajectory.exposure import Exposure
from hf_rgm.trajectory.trajectory import Trajectory

logger = logging.getLogger(__name__)

CACHE_BYTES = 2**30
"""Memory for rows that are collated once and kept."""


class ReverseGradientMatchingDistiller:
    """
    Distils a recorded training run into a synset.

    Args:
        model (`nn.Module`): The trained model, as the `Trainer` left it.
        trajectory (`str`, `Path`, `Trajectory` or a list of them): What `TrajectoryCallback` recorded. Several runs
            may differ in their seed only, and the first must be the model's. Scores are then means over the runs,
            which agree better with retraining with any seed.
        train_dataset: The training dataset, same rows in the same order.
        clusters (`ClusterMap`): Which row belongs to which cluster.
        config (`DistillationConfig`, *optional*): Settings.
        data_collator (`Callable`, *optional*): The Trainer's, or a tokenizer if it was the Trainer's
            `processing_class`. Defaults to `default_data_collator`.
        row_loss (`Callable`, *optional*): Takes logits `(batch_size, *positions, num_labels)` and labels and returns
            the loss of each row, `(batch_size,)`. That of `TrajectoryCallback(row_loss=...)`. Defaults
            to the cross entropy, with the label smoothing of the recorded run.
        remove_unused_columns (`bool`, *optional*): As in `TrainingArguments`. Defaults to that of the recorded run.
        output_dir (`str` or `Path`, *optional*): Folder for finished blocks of clusters. A killed run continues there.
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bar.

    Raises:
        NotImplementedError: If the model is an encoder-decoder.
        ValueError: If dataset, clusters, trajectory and model do not belong together.

    Example:

    ```python
    >>> from hf_rgm import ReverseGradientMatchingDistiller
    >>> from hf_rgm.testing import tiny_recorded_run
    >>> run = tiny_recorded_run()
    >>> distiller = ReverseGradientMatchingDistiller(
    ...     run.model, run.trajectory, run.train_dataset, run.clusters, disable_tqdm=True
    ... )
    >>> synset = distiller.distill()
    >>> synset.matching_error < 0.5
    True

    ```
    """

    def __init__(
        self,
        model: nn.Module,
        trajectory: str | Path | Trajectory | Sequence[str | Path | Trajectory],
        train_dataset: Any,
        clusters: ClusterMap,
        *,
        config: DistillationConfig | None = None,
        data_collator: DataCollator | None = None,
        row_loss: LossFunction | None = None,
        remove_unused_columns: bool | None = None,
        output_dir: str | Path | None = None,
        disable_tqdm: bool = False,
    ) -> None:
        self.config = config or DistillationConfig()
        self._processes = Processes()
        self.trajectories = open_runs(trajectory, model, train_dataset, data_collator, row_loss)
        self.clusters = clusters
        self.disable_tqdm = disable_tqdm
        first = self.trajectories[0]
        self.model = FunctionalModel(
            model,
            trainable_names=tuple(first.parameter_shapes),
            device=self._processes.device,
            shifts_labels=first.shifts_labels,
        )
        self.inputs = input_space(
            self.model,
            self.config.token_inputs,
            num_tokens=min(self.config.num_tokens, first.longest_input or self.config.num_tokens),
            num_choices=self.config.num_token_choices,
        )
        options = first.reader_options
        if remove_unused_columns is not None:
            options["remove_unused_columns"] = remove_unused_columns
        self.reader = RowReader(train_dataset, self.model, data_collator=data_collator, **options)
        self.reader.warn_of_draws()
        check_runs(self.model, self.trajectories, train_dataset)
        clusters.check_num_rows(len(self.reader))
        check_distillable(self.model, *self.reader.batch([0]))
        self.row_loss = row_loss_of(self.trajectories, self.reader, row_loss)
        rows = [clusters.rows(k) for k in range(clusters.num_clusters)]
        self.batches = CachedBatches(self.reader, rows, batch_size=self.config.batch_size, max_bytes=CACHE_BYTES)
        self.matched_states = matched_states(self.trajectories, clusters)
        self._gradients = SynsetGradients(self.model, self.inputs)
        # Measured, so processes may differ; all must agree on the blocks.
        self._plan = self._processes.gather(self._plan_memory)[0]
        self._store = BlockStore(output_dir, self._identity()) if output_dir is not None else None

    def _identity(self) -> dict[str, Any]:
        """Identity of a distillation: only the same one may continue its blocks."""
        return {
            "config": self.config.to_dict(),
            "parameters_sha256": parameters_sha256(self.model.parameters()),
            "other_runs_sha256": [parameters_sha256(t.final.parameters) for t in self.trajectories[1:]],
            "dataset_fingerprint": self.trajectories[0].dataset_fingerprint,
            "cluster_ids_sha256": hashlib.sha256(self.clusters.cluster_ids.tobytes()).hexdigest(),
            "matched_states": [[state.run, state.step] for state in self.matched_states],
            "block_size": self._plan.block_size,
            "sketch_dimension": self._plan.sketch_dimension,
        } | rows_identity(self.reader, self.row_loss)

    def estimate(self) -> CostEstimate:
        """
        Estimates what [`~ReverseGradientMatchingDistiller.distill`] needs, from one timed batch and iteration.

        Returns:
            `CostEstimate`: `seconds` for all `num_iterations`, and `least_seconds` for the first rounds alone, as the
            number of rounds is not known in advance.
        """
        model, plan, config, num_clusters = self.model, self._plan, self.config, self.clusters.num_clusters
        states = StateVectors(model.space, self.trajectories, self.matched_states, model.device, in_memory=False)
        block = range(plan.block_size)
        with torch.enable_grad(), model.differentiable():
            row = measure_rows(model, states[-1], self.batches, self.row_loss)
            start = self._initial_samples(block)
            # Ones in place of real gradients take the same time.
            gradients = torch.ones(1, device=model.device).expand(
                len(states), len(block), plan.sketch_dimension or model.num_parameters
            )
            learner = self._learner(block, states, gradients)
            iteration, settling = learner.time_iteration(start), learner.time_settling(start)
        rows = row.seconds * len(self.reader) * len(states)
        share = num_clusters / plan.block_size / min(self._processes.count, plan.num_blocks)
        rounds = list(round_lengths(config.num_iterations))
        most, least = (
            rows / self._processes.count + (iteration * sum(lengths) + settling * len(lengths)) * share
            for lengths in (rounds, rounds[:LEAST_ROUNDS] if config.tolerance else rounds)
        )
        samples_bytes = sum(tensor.nbytes for tensor in start.named_tensors().values()) * num_clusters // len(block)
        return CostEstimate(
            seconds=most,
            least_seconds=least,
            memory_bytes=plan.held_bytes + max(plan.step_bytes, row.peak_bytes) + self._cached_bytes(),
            disk_bytes=2 * samples_bytes + sum(trajectory.states_bytes for trajectory in self.trajectories),
            num_blocks=plan.num_blocks,
            sketched=plan.sketch_dimension is not None,
        )

    @advice_on_memory(
        "Distilling",
        "Lower `DistillationConfig(max_memory=...)`; if it is mostly the rows of a batch, lower `batch_size`.",
    )
    def distill(self) -> Synset:
        """
        Runs reverse gradient matching.

        Under `torchrun` or `accelerate launch` the processes share the blocks of clusters. All must call this and see
        the same `output_dir`.

        Returns:
            `Synset`: On the CPU, the same on every process.

        Raises:
            DivergenceError: If the matching error becomes NaN, infinite or explodes. Names cluster and state.
            MemoryError: If memory runs out. Names the setting to lower.
            RuntimeError: If another process failed.
            ValueError: If the data holds NaN, labels out of range, or inputs that are not continuous.
        """
        start = time.perf_counter()
        model, exact = self.model, self._plan.sketch_dimension is None
        states = StateVectors(model.space, self.trajectories, self.matched_states, model.device, in_memory=exact)
        size = self._plan.block_size
        clusters = range(self.clusters.num_clusters)
        blocks = [clusters[k : k + size] for k in clusters[::size]]
        finished = self._processes.gather(lambda: self._finished(blocks))[0]
        pending = [block for block in blocks if block not in finished]
        idle = self._processes.count - len(pending)
        if pending and idle > 0 and self._processes.is_main:
            logger.warning(
                "%d processes have nothing to distil: only %d blocks of clusters are left. Lower `cluster_block_size` "
                "(now %d) to give work to all.",
                *(idle, len(pending), self.config.cluster_block_size),
            )
        gradients_bytes = 4 * len(states) * len(clusters) * model.num_parameters  # float32
        keeps = exact and self.config.responses != "none" and gradients_bytes <= CACHE_BYTES
        kept: list[Tensor] = []

        def work(block: range) -> dict[str, Tensor]:
            done, gradients = self._distill_block(block, states)
            if keeps:
                kept.append(gradients)
            if self._store:
                self._store.write(block, done)
            return done

        with torch.enable_grad(), self.model.differentiable():
            finished |= dict(zip(pending, self._processes.map(work, pending), strict=True))
        ordered = [dict(finished[block]) for block in blocks]
        residuals = torch.cat([done.pop("residuals") for done in ordered], dim=1)
        iterations = [int(done.pop("iterations")) for done in ordered]
        responses = self._responses(kept)
        if self._processes.is_main and responses is None:
            warn_unless_matched(self.matched_states, residuals)
        merged = {name: torch.cat([done[name] for done in ordered]) for name in ordered[0]}
        samples = SyntheticSamples(**merged)
        tokens = self.inputs.tokens(samples.flatten().map(lambda tensor: tensor.to(self.model.device)))
        return Synset(
            samples=samples,
            residuals=residuals,
            clusters=self.clusters,
            trajectories=self.trajectories,
            matched_states=self.matched_states,
            parameters_sha256=parameters_sha256(self.model.parameters()),
            input_name=self.inputs.name,
            responses=responses,
            config=self.config.to_dict(),
            metadata={
                "dataset_fingerprint": self.trajectories[0].dataset_fingerprint,
                "num_rows": len(self.reader),
                "labels_per_row": self.row_loss.labels_per_row,
                "label_smoothing_factor": self.row_loss.label_smoothing,
                "loss_scale": self.row_loss.scale,
                "tokens": None if tokens is None else tokens.tolist(),
                "privacy": measure_privacy(self.inputs, samples, self.batches),
                "custom_row_loss": self.row_loss.function is not None,
                "iterations": iterations,
                "distillation_seconds": round(time.perf_counter() - start, 2),
                "num_processes": self._processes.count,
            },
        )

    def _responses(self, kept: list[Tensor]) -> Responses | None:
        """Responses by the rows, for a single run."""
        # kept: the clusters' gradients at the matched states in parts, (num_states, some_clusters, num_parameters).
        model, (trajectory, *others) = self.model, self.trajectories
        if self.config.responses == "none" or others:
            return None
        states_bytes = 8 * len(trajectory.state_steps) * model.num_parameters
        max_bytes = max(1, self.config.max_bytes - states_bytes)
        exposure = Exposure(trajectory, self.clusters)
        rows = RowSource(
            model,
            self.reader,
            self.clusters,
            self.row_loss,
            max_bytes=MemoryShares.of(max_bytes, with_rows=True).kept,
            processes=self._processes,
            exposure=exposure,
        )
        # Processes read the rows all together or not at all, and each kept only its own blocks: reuse on one only.
        seen_alike = exposure.of_clusters(trajectory.state_steps) is None
        if (
            seen_alike
            and self._processes.count == 1
            and sum(part.shape[1] for part in kept) == self.clusters.num_clusters
        ):
            states = [state.step for state in self.matched_states]
            rows.keep(trajectory, WholeGradients(self.model.space), states, torch.cat(kept, dim=1))
            kept.clear()
        run = RecordedRun(
            model,
            trajectory,
            self.clusters,
            rows=rows,
            max_states=exposure.max_states,
            max_bytes=max_bytes,
            processes=self._processes,
            disable_tqdm=self.disable_tqdm,
        )
        with model.differentiable():
            return compute_responses(
                run, precision=self.config.responses, parameters_sha256=parameters_sha256(model.parameters())
            )

    def _finished(self, blocks: Sequence[range]) -> dict[range, dict[str, Tensor]]:
        """Blocks of an earlier run, read by the main process."""
        if self._store is None or not self._processes.is_main:
            return {}
        return {block: done for block in blocks if (done := self._store.read(block)) is not None}

    def _plan_memory(self) -> MemoryPlan:
        with torch.enable_grad(), self.model.differentiable():
            match = measure_match(self._gradients, self.model.parameters(), self._initial_samples(range(1)))
        sizes = self.model.num_parameters, len(self.matched_states), self.clusters.num_clusters
        return plan_memory(self.config, *sizes, match)

    def _cached_bytes(self) -> int:
        inputs, labels = next(self.batches.group(0))
        own = sum(tensor.nbytes for tensor in (*inputs.values(), labels))
        return min(CACHE_BYTES, own * len(self.reader) // len(labels))

    @functools.cached_property
    def _sketch(self) -> Callable[[Tensor], Tensor]:
        dimension = self._plan.sketch_dimension
        if dimension is None:
            return lambda vectors: vectors
        return CountSketch(self.model.num_parameters, dimension, seed=self.config.seed, device=self.model.device)

    def _initial_samples(self, block: range) -> SyntheticSamples:
        inputs, _ = self.reader.batch([0])
        with torch.no_grad():
            num_labels = self.model.logits(self.model.parameters(), inputs).shape[-1]
        return initial_samples(self.batches, block, self.inputs, num_labels, self.row_loss, self.config)

    def _distill_block(self, block: range, states: StateVectors) -> tuple[dict[str, Tensor], Tensor]:
        """Learned tensors of a block of clusters, and the real gradients or their sketches."""
        gradients = cluster_gradients(
            *(self.model, states, self.batches, block, len(self.reader), self.row_loss),
            form=lambda gradients: self._sketch(self.model.space.flatten(gradients)),
        )
        learner = self._learner(block, states, gradients)
        samples, iterations = learner.learn(
            self._initial_samples(block),
            description=f"Distilling clusters {block.start}-{block.stop - 1}",
            disable_tqdm=self.disable_tqdm or not self._processes.shows_progress,
        )
        done = {
            **samples.map(Tensor.cpu).named_tensors(),
            "residuals": learner.residuals(samples).cpu(),
            "iterations": torch.tensor(iterations),
        }
        return done, gradients

    def _learner(self, block: range, states: StateVectors, gradients: Tensor) -> BlockLearner:
        return BlockLearner(
            self._gradients,
            [self.clusters.names[k] for k in block],
            states,
            gradients,
            self.config,
            torch.Generator().manual_seed(self.config.seed * 1_000_003 + block.start),
            sketch=self._sketch,
            chunk_size=self._plan.chunk_size,
        )
