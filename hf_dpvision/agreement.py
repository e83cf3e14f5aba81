"""What all processes of one run have to agree on, as short digests that can be compared.

A process that differs would still take part in every reduction, so the sums would be added up, and the statement,
which process 0 writes, would be wrong about them.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from torch import nn

from .training_args import DPTrainingArguments


# About the machine or the display; a process may have its own without changing the run.
_OF_ONE_PROCESS = {
    "output_dir", "logging_dir", "run_name", "hub_token", "local_rank", "disable_tqdm", "log_level",
    "log_level_replica", "report_to", "dataloader_num_workers", "dataloader_prefetch_factor",
    "dataloader_pin_memory", "dataloader_persistent_workers",
}  # fmt: skip


def digests(args: DPTrainingArguments, model: nn.Module, dataset_size: int) -> dict[str, str]:
    """Return name -> digest of every argument, of the shapes that are trained, the data set's size and the code."""
    found = {
        f"the argument {field.name}": _digest(repr(getattr(args, field.name)))
        for field in fields(args)
        if field.name not in _OF_ONE_PROCESS
    }
    shapes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    return found | {
        "the model's parameters": _digest(repr(shapes)),
        "the training set's size": str(dataset_size),
        "the package's code": code(),
        "the version of torch": torch.__version__,
        "the version of transformers": transformers.__version__,
    }


def code() -> str:
    """Return a digest of this package's source files."""
    folder = Path(__file__).parent
    files = sorted(folder.rglob("*.py"))
    return _digest("".join(f"{file.relative_to(folder)}\n{file.read_text(encoding='utf-8')}" for file in files))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
