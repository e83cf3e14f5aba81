"""The loader behind the sampler: it reads drawn examples one by one and collates those that can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from .data.examples import OneByOne, ReadableOnly
from .data.grouping import without_columns
from .data.units import ReadableUnits, UnitByUnit
from .errors import LoadingError
from .training_args import DPTrainingArguments


class ExampleLoader(DataLoader):
    """A `DataLoader` that says what it means when a worker is gone and its last examples cannot be fetched from it."""

    def __iter__(self) -> Iterator[Any]:
        return _fetched(super().__iter__())


def _fetched(loaded: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from loaded
    except (EOFError, ConnectionError) as error:
        raise _lost(error) from error


def as_read(dataset: Any, args: DPTrainingArguments) -> Any:
    """Return the data set without the columns by which rows are grouped or told apart: no model is to see them."""
    named = (args.privacy_unit_column, args.id_column)
    return without_columns(dataset, [name for name in named if name is not None])


def example_loader(
    dataset: Any, collate: Callable[[list[Any]], Any], batch_sampler: Any, args: DPTrainingArguments
) -> DataLoader:
    """Return a loader of the microbatches that `batch_sampler` names, set up by the `dataloader_*` arguments.

    A microbatch lacks its unreadable examples; one that has no other is an empty mapping. With `privacy_unit_column`,
    `batch_sampler` names lists of rows, one for each unit, which become `args.rows_per_unit` weighted rows.
    """
    workers = args.dataloader_num_workers
    examples = OneByOne(as_read(dataset, args), (*args.label_names, "label", "labels"), args.augmentation_multiplicity)
    grouped = args.privacy_unit_column is not None
    return ExampleLoader(
        UnitByUnit(examples) if grouped else examples,
        batch_sampler=batch_sampler,
        collate_fn=ReadableUnits(collate) if grouped else ReadableOnly(collate),
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        # not started anew at each epoch: a fork while the last workers' threads end can hang (CPython 3.11)
        persistent_workers=workers > 0,
        # of the workers' seeds; the global one decides about dropout, and a resumed run starts its workers elsewhere
        generator=torch.Generator().manual_seed(args.seed),
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        timeout=args.dataloader_timeout if workers else 0,
        worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
    )


@contextmanager
def lost_workers_explained() -> Iterator[None]:
    """Around training: torch reports the death of a worker wherever the main process happens to be.

    Raises:
        LoadingError: a worker has ended, or let the main process wait longer than `dataloader_timeout`.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader "):  # what torch says of its workers; errors in them read otherwise
            raise
        raise _lost(error) from error


def _lost(error: Exception) -> LoadingError:
    return LoadingError(
        f"Examples could not be loaded ({type(error).__name__}: {error}): a worker process has ended or hangs. "
        "Nothing of the unfinished step has been released, and what was charged stays charged. Workers are often "
        "ended for the memory they take: lower dataloader_num_workers (0 loads in this process) or "
        "dataloader_prefetch_factor, raise dataloader_timeout if loading is slow, and go on with "
        "train(resume_from_checkpoint=True)."
    )
