"""Random stand-ins for private examples: the self-check needs their shapes, never their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import DataRefused


def describe_example(dataset: Any, collate: Callable[[list[Any]], Any], label_name: str) -> dict[str, Tensor]:
    """Return one collated example as tensors on the meta device: names, shapes `[1, ...]` and dtypes, no values.

    Raises:
        DataRefused: the collated example is not a mapping of tensors with a first dimension of 1, or has no labels.
    """
    batch = collate([dataset[0]])
    if not isinstance(batch, Mapping) or not batch:
        raise DataRefused(
            f"The data collator returned {type(batch).__name__} for one example, where a mapping such as "
            '{"pixel_values": ..., "labels": ...} is needed. Pass a data_collator that returns one; for a '
            "datasets.Dataset, with_transform decides what an example holds."
        )
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != 1:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DataRefused(
                f"The data collator returned {found} as {name!r} for one example, where a tensor with first dimension "
                "1 is needed: the examples of a batch could not be told apart. Drop the key in the collator."
            )
    if label_name not in batch:
        raise DataRefused(
            f"An example has the keys {sorted(batch)} and no {label_name!r}: without labels there is nothing to "
            f"learn. Name the labels {label_name!r} in the transform or the collator, or set label_names."
        )
    return {name: torch.empty_like(value, device="meta") for name, value in batch.items()}


def random_examples(
    description: Mapping[str, Tensor], count: int, label_name: str, device: torch.device
) -> dict[str, Tensor]:
    """Return `count` random examples of the described shapes and dtypes on `device`.

    Floating-point inputs are standard normal, labels are 0 or 1 (valid for any number of classes, and for several
    at once), other whole numbers and booleans are 0.
    """
    generator = torch.Generator().manual_seed(0)
    examples = {}
    for name, value in description.items():
        shape = (count, *value.shape[1:])
        if name == label_name:
            drawn = torch.randint(2, shape, generator=generator)
        elif value.is_floating_point():
            drawn = torch.randn(shape, generator=generator)
        else:
            drawn = torch.zeros(shape)
        examples[name] = drawn.to(device=device, dtype=value.dtype)
    return examples
