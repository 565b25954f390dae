"""A rehearsal of attribution before the first step: is the loss that is trained the one that will be attributed?"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Trainer

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import IGNORED_LABEL, LOSSES_OF_NUMBERS, LossFunction, RowLoss, check_labels
from hf_rgm.model.row_reader import RowReader, all_labels
from hf_rgm.model.synthetic_inputs import TOKENS, check_distillable
from hf_rgm.model.vectorize import grad
from hf_rgm.recording.comparison import Comparison, compared
from hf_rgm.recording.own_loss import OwnLoss, described_loss
from hf_rgm.trajectory.trained_loss import TrainedLoss

logger = logging.getLogger(__name__)

ROWS_AT_ONCE, CLASSES_AT_ONCE, MAX_CLASSES = 8, 4, 32
LEAST_SCALE_ROWS, MOST_SCALE_ROWS, SCALE_SHARE = 64, 2048, 0.02
"""Rows by which a scale is measured that depends on the rows, and their share of those that are trained on."""
MIN_COSINE, TOLERANCE = {False: 0.9999, True: 0.98}, {False: 0.01, True: 0.05}
"""Least cosine of the two gradients, and relative differences of lengths that do not count; True for 16 bits."""
MIN_COSINE_LATER, TOLERANCE_LATER = {False: 0.999, True: 0.9}, {False: 0.02, True: 0.25}
"""The same during training, whose gradients become small."""
NEGLIGIBLE = 1e-3
"""Share of the first gradient's length below which rounding is all there is."""
EXACT = {False: 1e-3, True: 0.02}
"""Relative differences that are rounding."""
MOVED, LEAST, MOST, MAX_TRIES = 0.5, 0.05, 0.9, 12
"""Share of its loss that a row loses, to first order, where losses are compared, and what may be left of it."""

WAY_OUT = (
    "Pass the loss of each row, a function of logits and labels, as `row_loss` to TrajectoryCallback (and later to "
    "the distiller, Attributor or pipeline), or train with the model's plain cross entropy."
)


class Rehearsal:
    """Compares the loss that a Trainer trains with the loss of rows that attribution takes."""

    def __init__(
        self, trainer: Trainer, model: nn.Module, dataloader: Any, names: list[str], row_loss: LossFunction | None
    ) -> None:
        args = self.args = trainer.args
        self.trainer = trainer
        self.row_loss = row_loss
        self.name: str | None = None  # of a loss of numbers
        self.model = FunctionalModel(model, trainable_names=names)
        # The Trainer has removed unused columns already.
        self.reader = RowReader(
            dataloader.dataset, self.model, data_collator=dataloader.collate_fn, remove_unused_columns=False
        )
        own = dict(model.named_parameters())
        self.trained = described_loss(trainer, self.model.module)
        self.own = OwnLoss(trainer, model, {name: own[name] for name in names})
        self.parameters = self.model.parameters()
        self.longest_input: int | None = None
        self.is_short = args.bf16 or args.fp16 or any(p.dtype.itemsize < 4 for p in own.values())
        self.batch_size = min(args.per_device_train_batch_size, ROWS_AT_ONCE)

    def follow(self, trained: TrainedLoss) -> None:
        """Takes the loss that an earlier rehearsal found."""
        self.model.shifts_labels = bool(trained.shifts_labels)
        if trained.name is not None:
            self._use(trained.name)

    def _use(self, name: str) -> None:
        """Takes a loss of numbers, a key of `LOSSES_OF_NUMBERS`."""
        self.name, self.row_loss = name, LOSSES_OF_NUMBERS[name]

    def compare(self, rows: NDArray[np.int64], *, times: int = 1) -> Comparison | None:
        """Compares gradients of some rows, in an update that has them so many times; `None` if none has a label."""
        collated = self.reader.collated(rows)
        inputs, labels = self.reader.tensors(collated, rows)
        count = self._count(labels)
        if self.model.main_input_name == TOKENS and TOKENS in inputs:
            self.longest_input = max(self.longest_input or 0, inputs[TOKENS].shape[-1])
        if count == 0:
            return None
        ours = self._gradient(lambda p: self._mean_loss(p, inputs, labels))
        theirs = self.own.gradient(collated, times=times)
        as_trained = int((self.reader.counted_labels(collated) != IGNORED_LABEL).sum())
        return compared(ours, theirs, (count, as_trained), rows)

    def agrees(self, comparison: Comparison | None) -> bool:
        return comparison is None or comparison.cosine >= MIN_COSINE[self.is_short]

    def run(self) -> tuple[TrainedLoss, Comparison]:
        """Compares the losses on some batches, and says how they are related; refuses what cannot be attributed."""
        batches = list(self._batches())
        collated = self.reader.collated(batches[0])
        if all_labels(collated) is None:
            raise NotImplementedError(
                f"{type(self.trainer).__name__} trains on rows without labels (they have: {', '.join(collated)}), as "
                "preferences and rewards are learned (DPO). Their loss is no function of a row's logits and labels, "
                "which attribution takes. Train with labels, such as by `SFTTrainer` on the chosen answers."
            )
        labelled = next((rows for rows in batches if self._count(self.reader.batch(rows)[1])), None)
        if labelled is None:
            raise ValueError(
                f"None of {sum(map(len, batches))} rows tried has a label other than {IGNORED_LABEL}: nothing is "
                "learned from them. Fix the labels."
            )
        inputs, labels = self._check_derivative(labelled)
        with self._told_apart(labelled):
            trained = self._compared(batches)
        try:
            check_distillable(self.model, inputs, labels)
        except (NotImplementedError, ValueError) as error:
            logger.warning(
                "This run can be attributed by its rows, but no synset can be distilled from it: %s", str(error)
            )
        return trained

    def _compared(self, batches: list[NDArray[np.int64]]) -> tuple[TrainedLoss, Comparison]:
        compared = {index: self._checked(rows) for index, rows in enumerate(batches)}
        known = {index: found for index, found in compared.items() if found is not None}
        first = next(iter(known.values()))
        counts_first = self._counts_first([*known.values()])
        scale = 1.0 if counts_first else self._scale(batches, known)
        adds = self._adds_micro_batches(first)
        self._check_training_mode(first.rows)
        self._check_rows_apart(first.rows)
        collator: Any = self.trainer.data_collator
        trained = TrainedLoss(
            scale=scale * (self.args.gradient_accumulation_steps if adds else 1),
            adds_micro_batches=adds,
            shifts_labels=self.model.shifts_labels,
            counts_first=counts_first,
            custom=self.row_loss is not None and self.name is None,
            name=self.name,
            cosine=min(found.cosine for found in known.values()),
            columns=sorted(getattr(self.reader.dataset, "column_names", None) or ()),
            remove_unused_columns=bool(self.args.remove_unused_columns),
            longest_input=self.reader.longest_input() or self.longest_input,
            data_collator=getattr(collator, "__qualname__", type(collator).__qualname__),
        )
        return trained, first

    def again(self, before: Comparison) -> str | None:
        """What has become of the trained loss since it was compared `before`; `None` if it is the same."""
        try:
            now = self.compare(before.rows)
        except ValueError as error:
            return str(error)
        if now is None or now.norm < NEGLIGIBLE * before.norm:
            return None
        ratio = now.ratio / before.ratio
        if now.cosine >= MIN_COSINE_LATER[self.is_short] and abs(ratio - 1) <= TOLERANCE_LATER[self.is_short]:
            return None
        return (
            f"{self.trained} is no longer what it was before the first step: on rows {now.rows.tolist()} its "
            f"gradient has cosine {now.cosine:.4f} with that of the recorded loss, and {ratio:.3g} times the length."
        )

    def _checked(self, rows: NDArray[np.int64]) -> Comparison | None:
        """The comparison of some rows; refuses them if the gradients differ in direction."""
        found = self.compare(rows)
        if not self.agrees(found) and self.name is None and self.reader.batch(rows)[1].dim() == 2:
            # A language model of one's own may shift its labels, or not, whatever its class is called.
            self.model.shifts_labels = not self.model.shifts_labels
            other = self.compare(rows)
            if self.agrees(other):
                return other
            self.model.shifts_labels = not self.model.shifts_labels
        if found is not None and not self.agrees(found):
            ours = "the cross entropy of the logits" if self.row_loss is None else "`row_loss`"
            ours = ours if self.name is None else f"the {self.name.replace('_', ' ')} of the logits"
            raise NotImplementedError(
                f"{self.trained} is not {ours}: on rows {rows.tolist()} the gradients have cosine "
                f"{found.cosine:.4f}. {WAY_OUT}"
            )
        return found

    def _batches(self) -> Iterator[NDArray[np.int64]]:
        """Some rows, of up to 32 classes, in batches as large as in training and one smaller."""
        generator = np.random.default_rng(0)
        order = generator.permutation(len(self.reader))
        classes = self.reader.classes()
        firsts = np.sort(np.unique(classes[order], return_index=True)[1])[:MAX_CLASSES] if classes is not None else []
        order = np.concatenate([order[firsts], np.delete(order, firsts)]) if len(firsts) else order
        # Texts differ in their numbers of labels, which fewer rows may not show.
        size = self.batch_size if classes is None else min(self.batch_size, CLASSES_AT_ONCE)
        smaller = max(1, size // 2)
        covered = max(len(firsts), size)
        yield from (order[start : start + size] for start in range(0, min(covered, len(order)), size))
        yield order[::-1][:smaller].copy()

    def _row_loss(self, labels: Tensor, *, scale: float = 1.0) -> RowLoss:
        return RowLoss(
            labels_per_row=self._count(labels) / len(labels) if self.row_loss is None else 1.0,
            label_smoothing=float(self.args.label_smoothing_factor or 0.0),
            function=self.row_loss,
            scale=scale,
        )

    def _count(self, labels: Tensor) -> int:
        return int((labels != IGNORED_LABEL).sum()) if self.row_loss is None else len(labels)

    def _mean_loss(self, parameters: dict[str, Tensor], inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        logits = self.model.logits(parameters, inputs)
        if self.row_loss is None:
            check_labels(logits, labels)
        return self._row_loss(labels)(logits, labels).mean()

    def _gradient(self, loss: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
        parameters = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        with torch.enable_grad():  # fused kernels, as first derivatives are all that is compared
            gradients = torch.autograd.grad(loss(parameters), list(parameters.values()), materialize_grads=True)
        return dict(zip(parameters, gradients, strict=True))

    def _counts_first(self, compared: Sequence[Comparison]) -> bool:
        """Whether the sum over labels is divided by a count that differs in those at the first position."""
        if self.row_loss is not None or not (self.model.shifts_labels or self.model.prompt_length):
            return False
        exact = EXACT[self.is_short]
        given = [found.ratio * found.counted / found.count for found in compared]
        return all(abs(each - 1) <= exact for each in given) and any(
            abs(found.ratio - 1) > exact for found in compared
        )

    def _scale(self, batches: list[NDArray[np.int64]], compared: Mapping[int, Comparison]) -> float:
        """Ratio of the trained loss to the mean over labels or rows, on average over the data."""
        ratios = {index: found.ratio for index, found in compared.items()}
        least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        divisors = {index: found.count / found.ratio for index, found in compared.items() if found.ratio > 0}
        counts = sum(compared[index].count for index in divisors)
        scale = counts / sum(divisors.values()) if len(divisors) == len(compared) else 0.0
        if scale > 0 and ratios[most] <= ratios[least] * (1 + TOLERANCE[self.is_short]):
            return 1.0 if abs(scale - 1) < EXACT[self.is_short] else scale
        # The loss may be divided by another sum over rows, such as that of their classes' weights.
        both = self.compare(np.concatenate([batches[least], batches[most]])) if scale > 0 else None
        expected = 0.0 if both is None else both.count / (divisors[least] + divisors[most])
        if both is None or abs(both.ratio / expected - 1) > TOLERANCE[self.is_short]:
            raise NotImplementedError(
                f"{self.trained} is not a mean over rows or labels: its gradient is {ratios[least]:.3g} times that "
                f"of the mean on {len(batches[least])} rows, {ratios[most]:.3g} times on {len(batches[most])} others. "
                "Divide the sum over a batch by the number of its rows or labels."
            )
        trained = self.trainer.state.max_steps * self.args.train_batch_size * self.args.gradient_accumulation_steps
        most_rows = min(MOST_SCALE_ROWS, max(LEAST_SCALE_ROWS, int(SCALE_SHARE * trained)))
        order = np.random.default_rng(1).permutation(len(self.reader))[:most_rows]
        total, divisor = 0, 0.0
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            collated = self.reader.collated(rows)
            inputs, labels = self.reader.tensors(collated, rows)
            if count := self._count(labels):
                with torch.no_grad():
                    ours = float(self._row_loss(labels)(self.model.logits(self.parameters, inputs), labels).mean())
                total, divisor = total + count, divisor + count * ours / self.own.value(collated)
        return total / divisor

    def _adds_micro_batches(self, once: Comparison) -> bool:
        """Whether an update's gradient is the sum over its micro-batches, and not the mean."""
        accumulated = self.args.gradient_accumulation_steps
        several = self.compare(once.rows, times=accumulated) if accumulated > 1 else None
        if several is None:
            return False
        times = several.ratio / once.ratio
        for adds, expected in ((False, 1.0), (True, accumulated)):
            if abs(times / expected - 1) <= TOLERANCE[self.is_short]:
                return adds
        raise NotImplementedError(
            f"{self.trained} gives {times:.3g} times the gradient with `gradient_accumulation_steps="
            f"{accumulated}`; it should be 1 or {accumulated} times. Divide it by `num_items_in_batch`, or by nothing."
        )

    def _check_training_mode(self, rows: NDArray[np.int64]) -> None:
        """Refuses losses that differ in training mode, but for what is random."""
        collated = self.reader.collated(rows)
        plain = self.own.value(collated)
        once = self.own.value(collated, training_seed=0)
        differs = abs(once - plain) > EXACT[self.is_short] * abs(plain)
        if differs and once == self.own.value(collated, training_seed=1):
            raise NotImplementedError(
                f"{self.trained} is {once:.4g} in training mode without dropout and {plain:.4g} in evaluation "
                "mode: what is added in training mode cannot be attributed. Train without it."
            )

    @contextlib.contextmanager
    def _told_apart(self, rows: NDArray[np.int64]) -> Iterator[None]:
        """A block with the parameters where rows have different losses, which they need not have at the start."""
        # Where all losses are equal, any function of them has the gradient of the mean, up to a constant.
        inputs, labels = self.reader.batch(rows)
        labelled = int((labels != IGNORED_LABEL).reshape(len(labels), -1).any(1).float().argmax())
        one, label = {name: value[labelled : labelled + 1] for name, value in inputs.items()}, labels[labelled:][:1]
        start, row_loss = self.parameters, self._row_loss(label)

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return row_loss(self.model.logits(parameters, one), label).sum()

        gradient = self._gradient(loss)
        squared = sum(float(value.square().sum()) for value in gradient.values())
        target = start
        with torch.no_grad():
            before = abs(float(loss(start)))
            for shrinking in range(MAX_TRIES if 0 < squared < np.inf else 0):
                length = MOVED * before / squared / 4**shrinking
                target = {name: value - length * gradient[name] for name, value in start.items()}
                if LEAST * before <= float(loss(target)) <= MOST * before:
                    break
            else:
                target = start
        with self.own.moved(target) as moved:
            self.parameters = {name: value.to(self.model.device) for name, value in moved.items()}
            yield
        self.parameters = start

    def _check_rows_apart(self, rows: NDArray[np.int64]) -> None:
        """Refuses models in which the rows of a batch change each other's gradients."""
        inputs, labels = self.reader.batch(rows[:2])
        row_loss, name = self._row_loss(labels), self.model.main_input_name
        lengths = {self.reader.batch(some)[0][name].shape[1] for some in (rows, *rows[:, None])}
        if self.model.predicts_spans and len(lengths) > 1:
            raise NotImplementedError(
                f"{type(self.model.module).__name__} chooses among the positions of a text, and texts are padded to "
                f"the longest of their batch ({min(lengths)} to {max(lengths)} tokens): rows of a batch change each "
                'other\'s losses. Pad all to one length, `tokenizer(..., padding="max_length")`.'
            )

        def loss(parameters: dict[str, Tensor], some: slice) -> Tensor:
            own = {name: value[some] for name, value in inputs.items()}
            return row_loss(self.model.logits(parameters, own), labels[some]).sum()

        together = self._gradient(lambda p: loss(p, slice(0, 2)))
        apart = [self._gradient(lambda p, row=row: loss(p, slice(row, row + 1))) for row in range(len(labels))]
        difference = sum(float((together[name] - sum(own[name] for own in apart)).square().sum()) for name in together)
        length = sum(float(value.square().sum()) for value in together.values())
        if difference > TOLERANCE[False] ** 2 * length:
            raise NotImplementedError(
                f"In {type(self.model.module).__name__} the rows of a batch change each other's losses: the gradient "
                f"of rows {rows[:2].tolist()} is not the sum of theirs (relative difference "
                f"{(difference / length) ** 0.5:.2g}). Train a model that treats rows apart."
            )

    def losses(self) -> tuple[list[int], list[float]]:
        """Some rows and the sums of their labels' losses; none if rows are collated at random."""
        rows = next(self._batches())
        (inputs, labels), (again, _) = (self.reader.batch(rows) for _ in range(2))
        if any(not torch.equal(inputs[name], again[name]) for name in inputs):
            return [], []
        row_loss = replace(self._row_loss(labels), labels_per_row=1.0)
        with torch.no_grad():
            losses = row_loss(self.model.logits(self.parameters, inputs), labels).tolist()
        return (rows.tolist(), losses) if np.isfinite(losses).all() else ([], [])

    def _check_derivative(self, rows: NDArray[np.int64]) -> tuple[dict[str, Tensor], Tensor]:
        """Refuses labels without a loss and models that `torch.func` cannot differentiate; gives inputs and labels."""
        inputs, labels = self.reader.batch(rows)
        computation = self._refused("computed without labels and in float32", "float32 that needs no labels")
        with torch.no_grad(), computation:
            logits = self.model.logits(self.parameters, inputs)
        if self.row_loss is None and labels.is_floating_point() and logits.numel() == labels.numel():
            self._choose_loss(rows, first="squared_error" if logits.shape[-1] == 1 else "binary_cross_entropy")
        if self.row_loss is None:
            check_labels(logits, labels)
        row_loss, one = self._row_loss(labels), {name: value[:1] for name, value in inputs.items()}
        derivative = self._refused("differentiated by `torch.func`", "PyTorch's own operators")
        with torch.enable_grad(), self.model.differentiable(), derivative:
            grad(lambda p: row_loss(self.model.logits(p, one), labels[:1]).sum())(self.parameters)
        return inputs, labels

    def _choose_loss(self, rows: NDArray[np.int64], *, first: str) -> None:
        """Takes the loss of numbers whose gradient is the trained one, or the first to be refused for what it is."""
        for name in sorted(LOSSES_OF_NUMBERS, key=lambda name: name != first):
            self._use(name)
            if self.agrees(self.compare(rows)):
                return
        self._use(first)

    @contextlib.contextmanager
    def _refused(self, what: str, way_out: str) -> Iterator[None]:
        """A block whose errors say what cannot be done with the model, unless memory runs out."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if should_reduce_batch_size(error):
                raise
            raise NotImplementedError(
                f"{type(self.model.module).__name__} cannot be {what}, as attribution does: "
                f"{str(error).split('. ')[0]}. Train a model of {way_out}."
            ) from error
