"""Clipping group by group: the parameters are split, and every group has its part of the bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from ..errors import ArgumentRefused
from .automatic import Automatic
from .flat import Flat
from .protocol import Clipping, Groups


_NO_MODULE = "(of the model itself)"


class Shares(Enum):
    """How the bound C is divided among m groups: `C_k = C * share_k`, where the squares of the shares add up to 1.

    EQUAL: `1 / sqrt(m)`. SIZE: `sqrt(p_k / p)` for a group with `p_k` of all `p` trained numbers, so that as much
    noise comes with every unit of the bound in every group.
    """

    EQUAL = "equal"
    SIZE = "size"


def by_layer(name: str) -> str:
    """The module that owns the parameter: `blocks.3.attn.qkv` for `blocks.3.attn.qkv.weight` and its bias."""
    return name.rpartition(".")[0] or _NO_MODULE


def by_block(name: str) -> str:
    """What comes up to the last number in the name: `blocks.3` for all parameters of that block.

    Names without a number, such as those of tokens, the last normalisation and the head, are grouped by layer.
    """
    parts = name.split(".")[:-1]
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else by_layer(name)


@dataclass(frozen=True)
class ByPrefix:
    """Groups by the beginning of the name, in whole parts; of several that fit, the longest counts.

    Args:
        groups: such as `{"vit.embeddings": "early", "vit.layers.0": "early", "vit": "late", "classifier": "head"}`;
            the beginning `""` fits every name.
    """

    groups: Mapping[str, str]

    def __call__(self, name: str) -> str:
        """Return the group of a parameter.

        Raises:
            ArgumentRefused: no beginning fits its name.
        """
        fitting = [prefix for prefix in self.groups if not prefix or f"{name}.".startswith(f"{prefix}.")]
        if not fitting:
            raise ArgumentRefused(
                f"The groups for clipping, {sorted(set(self.groups.values()))}, leave out the parameter {name!r}: a "
                f"parameter without a bound would be unprotected. None of {sorted(self.groups)[:8]} is the beginning "
                "of its name; add one that is, or '' for all the rest."
            )
        return self.groups[max(fitting, key=len)]


@dataclass(frozen=True)
class PerGroup(Clipping):
    """Every example's gradient in group k is clipped to `C_k`, and the squares of all `C_k` add up to `C^2`.

    Guarantee: `sum_k ||f_k g_k||^2 <= sum_k C_k^2 = C^2`, so removing one example moves the clipped sum over all
    parameters, as one vector, by at most C: the sensitivity and the noise are those of flat clipping to C. The groups
    and their bounds follow from the names and sizes of the trained parameters, never from data.

    What it does to accuracy is another matter: C is spread over all groups whether or not they need it, so that C has
    to be chosen anew.

    Args:
        style: `Flat(C)` or `Automatic(C)`: C in total, and how the factor follows from the norm in each group.
        groups: qualified parameter name -> name of its group: `by_layer`, `by_block`, a function of your own, or a
            mapping of beginnings of names as for `ByPrefix`.
        shares: how C is divided.

    Edge cases: an example whose norm is not finite in some group contributes zero to all. Groups may cut through
    tensors that are used together, as BEiT's `cat(q_bias, zeros, v_bias)`: each parameter counts in its own group.

    Source: McMahan et al. 2017, arXiv:1710.06963 (per-layer clipping); He et al. 2022, arXiv:2212.01539.
    """

    style: Flat | Automatic
    groups: Callable[[str], str] | Mapping[str, str] = by_layer
    shares: Shares = Shares.EQUAL

    def over(self, sizes: Mapping[str, int]) -> Groups:
        """The groups of these parameters, in the order in which they are met.

        Raises:
            ArgumentRefused: a mapping leaves a parameter out.
        """
        group_of = ByPrefix(self.groups) if isinstance(self.groups, Mapping) else self.groups
        chosen = {name: group_of(name) for name in sizes}
        names = tuple(dict.fromkeys(chosen.values()))
        place = {name: column for column, name in enumerate(names)}
        columns = {name: place[group] for name, group in chosen.items()}
        shares = self._shares(sizes, columns, len(names))
        return Groups(columns, names, tuple(self._with_share(share) for share in shares))

    def sensitivity(self) -> float:
        """C, in total."""
        return self.style.sensitivity()

    def _shares(self, sizes: Mapping[str, int], columns: Mapping[str, int], count: int) -> list[float]:
        if self.shares is Shares.EQUAL:
            return [1 / math.sqrt(count)] * count
        numbers = [0] * count
        for name, column in columns.items():
            numbers[column] += sizes[name]
        return [math.sqrt(number / sum(numbers)) for number in numbers]

    def _with_share(self, share: float) -> Flat | Automatic:
        return replace(self.style, max_norm=self.style.max_norm * share)
