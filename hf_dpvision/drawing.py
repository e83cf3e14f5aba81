"""Which draws a trainer uses: by index, by unit of privacy, or over a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from . import processes
from .data.grouping import Units
from .plan import Plan
from .sampling import Draws, LogicalBatchIndices, PoissonSampler
from .streamed import StreamedExamples
from .streaming import RowSource
from .training_args import DPTrainingArguments
from .unit_sampling import UnitSampler


def draws_of(
    dataset: Any,
    units: Units | None,
    args: DPTrainingArguments,
    plan: Plan,
    key: bytes,
    block: int,
    run_id: str | None,
    stop: Callable[[], None],
) -> Draws:
    """Return who takes part in which step of a call of `train()`.

    Args:
        dataset: the training set.
        units: the rows of each unit of privacy; None if every example is one.
        args: of the trainer.
        plan: of this call.
        key: secret; that of the first process is used by all.
        block: so many drawn in a row go to the same process.
        run_id: of the ledger, known to the first process.
        stop: called now and then while a stream is read; it raises if the run is to end.
    """
    key = processes.same_key(key, args.device)
    sampler = PoissonSampler(key, plan.dataset_size, plan.sample_rate, block)
    if units is not None:
        return UnitSampler(sampler, units, key, args.examples_per_unit)
    if isinstance(dataset, StreamedExamples):
        return dataset.draws(sampler, plan.first_draw + plan.steps, run_id, stop, args.device)
    return sampler


@contextmanager
def prepared(dataset: Any, args: DPTrainingArguments, num_labels: int | None) -> Iterator[None]:
    """Around training: a stream is made ready and cleaned up; see `StreamedExamples.prepared` for what is refused."""
    with dataset.prepared(args, num_labels) if isinstance(dataset, StreamedExamples) else nullcontext():
        yield


def row_source_of(dataset: Any) -> RowSource:
    """Return where the rows of a draw are read from."""
    return dataset.row_source if isinstance(dataset, StreamedExamples) else RowSource.INDEXED


def indices_of(draws: Draws, args: DPTrainingArguments, plan: Plan) -> LogicalBatchIndices:
    """Return this process's share of each step, epoch by epoch."""
    return LogicalBatchIndices(
        draws, plan.steps_per_epoch, args.process_index, args.world_size, plan.first_draw
    )
