"""Canary examples: put into a training set by coin flips, and guessed afterwards."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..errors import ArgumentRefused, DataRefused


@dataclass(frozen=True)
class CanarySet(Dataset):
    """A training set with canaries behind it, of which those that lost their coin flip are zeroed out.

    Zeroed out: reading one fails as a broken picture does, so that it contributes nothing to a step that draws it. The
    number of examples, and with it the sampling rate, does not depend on the coins.

    Args:
        examples: the training set as it was, map-style.
        canaries: what is added.
        present: whether each of them is in.
    """

    examples: Any
    canaries: tuple[Any, ...]
    present: np.ndarray

    def __len__(self) -> int:
        return len(self.examples) + len(self.canaries)

    def __getitem__(self, index: int) -> Any:
        number = int(index) - len(self.examples)
        if number < 0:
            return self.examples[int(index)]
        if not self.present[number]:
            raise DataRefused("This canary is zeroed out.")
        return self.canaries[number]


def with_canaries(
    examples: Any, count: int, label_name: str, coins: np.random.Generator | None = None
) -> CanarySet:
    """Add `count` mislabelled examples, each in with probability 1/2: pictures that only memory can get right.

    A canary has the picture of one training example, as its transform shows it once, and the label of another one with
    a different label.

    Args:
        examples: map-style training set of mappings.
        count: of canaries, at most half as many as there are examples.
        label_name: the key of an example's label.
        coins: chooses pictures, labels and who is in; by default seeded by the operating system.

    Raises:
        ArgumentRefused: too few or too many canaries.
        DataRefused: not a map-style data set of mappings with that key, or all labels are equal.
    """
    size = len(examples)
    if not 4 <= count <= size // 2:
        raise ArgumentRefused(
            f"{count} canaries for {size} examples: at least 4 are needed for any bound, and more than half as many "
            f"as examples would train the model on them. Choose at most {size // 2}."
        )
    choose = np.random.default_rng(secrets.randbits(128)) if coins is None else coins
    rows = choose.permutation(size)
    canaries: list[Any] = []
    for index in rows:
        if len(canaries) == count:
            break
        picture, other = _readable(examples, int(index), label_name), None
        for _ in range(50):
            other = _readable(examples, int(choose.integers(size)), label_name)
            if picture is not None and other is not None and bool(other[label_name] != picture[label_name]):
                canaries.append({**picture, label_name: other[label_name]})
                break
    if len(canaries) < count:
        raise DataRefused(
            f"Only {len(canaries)} of {count} canaries could be made: an example is mislabelled with a label of "
            "another one, and the labels of these do not differ, or the examples cannot be read."
        )
    return CanarySet(examples, tuple(canaries), choose.random(count) < 0.5)


def _readable(examples: Any, index: int, label_name: str) -> Mapping[str, Any] | None:
    try:
        example = examples[index]
    except (OSError, ValueError):  # a broken picture; it contributes nothing, and makes no canary
        return None
    if not isinstance(example, Mapping) or label_name not in example:
        raise DataRefused(
            f"Example {index} of the training set is no mapping with the key {label_name!r}: a canary is made by "
            "changing the label. Pass a training set of mappings."
        )
    return None if example[label_name] is None else example
