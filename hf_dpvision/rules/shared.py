"""Several uses that read one activation, as separate projections to queries, keys and values do: its Gram matrix once.

`||R_q^T C||^2 = <R_q R_q^T, C C^T>`, and the same for `k` and `v`: of six Gram matrices two are the same as a third.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from torch import Tensor

from .affine import Affine, AffineShape
from .cost import Choice
from .gradients import PerExampleGradient


Taken = tuple[Any, Tensor, PerExampleGradient]


def same_activation(slots: Iterable[Any]) -> Iterator[list[Any]]:
    """Uses with sizes, in order, those in one list that read the same activation one after another.

    Only neighbours, so that what waits for the last of them is never more than one block's output gradients.
    """
    shaped = [slot for slot in slots if slot.shape is not None]
    for _, members in groupby(shaped, key=lambda slot: slot if slot.reads is None else slot.reads):
        yield list(members)


def shapes(slots: Iterable[Any]) -> dict[Any, AffineShape]:
    """The sizes of every use that has some, with how many read its activation."""
    return {
        slot: slot.shape if len(members) == 1 else replace(slot.shape, readers=len(members))
        for members in same_activation(slots)
        for slot in members
    }


@dataclass
class _Readers:
    """Uses of one activation: those whose gradients are awaited, and those that are there."""

    awaited: set[Any]
    delivered: dict[Any, Affine] = field(default_factory=dict)


class TakenNorms:
    """Squared norms of the uses of one step, taken while their gradients arrive.

    The gradients of uses that share an activation wait until the last of them is there, also with two passes: what
    the backward pass needs for their input has all of them at that moment anyway.

    Args:
        planner: computes the norm of a single use.
        slots: in order, each with its own tensor.
        choices: by use.
    """

    def __init__(self, planner: Any, slots: Sequence[Any], choices: Mapping[Any, Choice]) -> None:
        self._planner, self._choices = planner, choices
        self._readers: dict[Any, _Readers] = {}
        for members in same_activation(slots):
            ghosts = [slot for slot in members if choices.get(slot) is Choice.GHOST]
            if len(ghosts) > 1:
                self._readers |= dict.fromkeys(ghosts, _Readers(set(ghosts)))

    def receive(self, slot: Any, gradient: PerExampleGradient) -> Iterator[Taken]:
        """Take one use's gradients; gives the uses whose squared norms `[n]` are now known, and what to hold."""
        readers = self._readers.get(slot)
        if readers is not None:
            readers.awaited.discard(slot)
        if readers is None or not isinstance(gradient, Affine):
            yield (slot, *self._planner.norms(slot, gradient, self._choices.get(slot)))
        else:
            readers.delivered[slot] = gradient
        if readers is not None and not readers.awaited:
            yield from self._together(readers)

    def rest(self) -> Iterator[Taken]:
        """The uses that still waited for one that no gradient reached; call once, after the backward pass."""
        for readers in list(self._readers.values()):
            yield from self._together(readers)

    def _together(self, readers: _Readers) -> Iterator[Taken]:
        delivered, readers.delivered = readers.delivered, {}
        if delivered:
            for slot, gradient in delivered.items():
                self._planner.learn(slot, gradient)
            norms = Affine.shared_ghost_squared_norms(list(delivered.values()))
            yield from zip(delivered, norms, delivered.values(), strict=True)
