"""Random stand-ins for private examples: the self-check needs their shapes, never their values."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .errors import DataRefused, DPVisionError


_DRAWS_OF_A_COLLATOR = 8  # a random exchange of two examples is missed with probability 2^-8


def describe_example(dataset: Any, collate: Callable[[list[Any]], Any], label_name: str) -> dict[str, Tensor]:
    """Return one collated example as tensors on the meta device: names, shapes `[1, ...]` and dtypes, no values.

    Raises:
        DataRefused: example 0 cannot be read; one index does not give one example; the collator fails on it; the
            collated example is not a mapping of tensors with a first dimension of 1, or has no labels; or the
            collator mixes the pixels of examples.
    """
    # the way the training loader reads it, without a draw from the global generator
    one = DataLoader(dataset, batch_sampler=[[0]], collate_fn=list, generator=torch.Generator())
    try:
        examples = next(iter(one))
    except DPVisionError:
        raise
    except Exception as error:
        raise DataRefused(
            f"Index 0 of train_dataset cannot be read: {type(error).__name__}: {error}. Example 0 tells what examples "
            "look like, so it has to be whole. If every example fails, mend the transform; if this one is broken, "
            "repair or remove it. (Broken examples met in training contribute nothing.)"
        ) from error
    if len(examples) != 1:
        raise DataRefused(
            f"Index 0 of train_dataset gives {len(examples)} examples: a transform adds or drops rows, so one private "
            "example would be clipped as several. Apply it to the whole data set beforehand (map), and count the "
            "resulting rows as examples, or return exactly one row for each."
        )
    batch = _collated(collate, examples)
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
    _refuse_mixing(collate, examples[0])
    return {name: torch.empty_like(value, device="meta") for name, value in batch.items()}


def _collated(collate: Callable[[list[Any]], Any], examples: list[Any]) -> Any:
    try:
        return collate(examples)
    except Exception as error:
        example = examples[0]
        kinds = {name: type(value).__name__ for name, value in example.items()} if isinstance(example, Mapping) else {}
        raise DataRefused(
            f"The data collator fails on one example ({type(example).__name__} {kinds}): {type(error).__name__}: "
            f"{error}. Every example needs pixels as a tensor and its label as a whole number: convert them in the "
            "data set or in the collator."
        ) from error


def _refuse_mixing(collate: Callable[[list[Any]], Any], example: Any) -> None:
    """Raise if the first of two collated random examples changes with the second (mixup, CutMix, batch statistics).

    Examples without a floating-point tensor or array cannot be imitated, and pass.
    """
    generator = torch.Generator().manual_seed(0)
    first, second, third = (_imitated(example, generator) for _ in range(3))
    if first is example:
        return
    for seed in range(_DRAWS_OF_A_COLLATOR):
        with _global_generators(seed):
            one = collate([first, second])
        with _global_generators(seed):
            other = collate([first, third])
        for name, value in one.items():
            if not torch.equal(value[0], other[name][0]):
                raise DataRefused(
                    f"The data collator mixes examples: {name!r} of the first example changes with the second one "
                    "(mixup, CutMix, or statistics of the batch). Then one example reaches the gradients of others, "
                    "and clipping bounds nothing. Use augmentations of single examples."
                )


def _imitated(example: Any, generator: torch.Generator) -> Any:
    """The example with random values in place of its floating-point tensors and arrays; itself if there are none."""
    changed: dict[str, Any] = {}
    for name, value in example.items() if isinstance(example, Mapping) else ():
        if isinstance(value, Tensor) and value.is_floating_point():
            changed[name] = torch.randn(value.shape, generator=generator).to(value.dtype)
        elif isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
            changed[name] = torch.randn(value.shape, generator=generator).numpy().astype(value.dtype)
    return {**example, **changed} if changed else example


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU), numpy and python, and put them back afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


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


@contextmanager
def explained_failure(examples: Mapping[str, Tensor]) -> Iterator[None]:
    """Turn an error of the model itself on random examples into a refusal that names their shapes.

    Raises:
        DataRefused: the model cannot process examples of these shapes. Refusals and a lack of memory pass through.
    """
    try:
        yield
    except (DPVisionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        shapes = ", ".join(f"{name}: {value.dtype} {list(value.shape[1:])}" for name, value in examples.items())
        raise DataRefused(
            f"The model fails on random examples of the data's shape ({shapes}): {type(error).__name__}: {error} "
            "Make size and order of channels ([channels, height, width]) of the images those that the model expects."
        ) from error
