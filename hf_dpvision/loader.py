"""The loader behind the sampler: it reads drawn examples one by one and collates those that can be read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from .data.examples import OneByOne, ReadableOnly
from .training_args import DPTrainingArguments


def example_loader(
    dataset: Any, collate: Callable[[list[Any]], Any], batch_sampler: Any, args: DPTrainingArguments
) -> DataLoader:
    """Return a loader of the microbatches that `batch_sampler` names, set up by the `dataloader_*` arguments.

    A microbatch lacks its unreadable examples; one that has no other is an empty mapping.
    """
    workers = args.dataloader_num_workers
    return DataLoader(
        OneByOne(dataset, (*args.label_names, "label", "labels")),
        batch_sampler=batch_sampler,
        collate_fn=ReadableOnly(collate),
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        timeout=args.dataloader_timeout if workers else 0,
        worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
    )
