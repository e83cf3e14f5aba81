"""What the results are held against, and whether they reach it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .points import Point


PROBE = ("cifar10",)
BIAS = ("cifar10_deit_tiny_bias",)
FULL = ("cifar10_deit_tiny_full",)
SCATTER = ("cifar10_scatter",)


@dataclass(frozen=True)
class Aim:
    """A mean accuracy to be reached.

    Args:
        what: in words.
        of: configurations whose best point counts.
        at: its epsilon.
        against: configurations whose best point at epsilon `against_at` is what it is compared with; or a published
            accuracy.
        within: how far below that it may lie; 0: it has to lie above.
        why_not: why it was not run, if it cannot be.
    """

    what: str
    of: tuple[str, ...]
    at: float
    against: tuple[str, ...] | float
    against_at: float = math.inf
    within: float = 0.0
    why_not: str = "not run yet"


@dataclass(frozen=True)
class Verdict:
    """How an aim was done; `reached` and `needed` are None if there is no point."""

    aim: Aim
    reached: Point | None
    needed: float | None

    @property
    def met(self) -> bool | None:
        if self.reached is None or self.needed is None:
            return None
        return self.reached.mean >= self.needed if self.aim.within else self.reached.mean > self.needed


NO_WEIGHTS = "cannot be run in full here, where its weights cannot be reached; the tests run it on a shrunk model"
AIMS = (
    Aim("CIFAR-10, linear probe: within 1 point of the probe without privacy", PROBE, 1.0, PROBE, within=0.01),
    Aim("CIFAR-10, linear probe: within 0.5 points of the probe without privacy", PROBE, 8.0, PROBE, within=0.005),
    Aim("CIFAR-10, BiTFiT: above the probe at the same epsilon", BIAS, 8.0, PROBE, 8.0),
    Aim("CIFAR-10, full fine-tuning: above the probe at the same epsilon", FULL, 8.0, PROBE, 8.0),
    Aim(
        "CIFAR-10, no pretraining: within 1 point of the 67.0 % of Tramèr and Boneh 2021",
        SCATTER, 3.0, 0.67, within=0.01,
    ),
    Aim(
        "CIFAR-10, BEiT-large: within 1 point of the 96.7 % of Bu, Mao and Xu 2022 (epsilon by a central limit)",
        ("cifar10_beit_large",), 1.0, 0.967, within=0.01, why_not=NO_WEIGHTS,
    ),
    Aim(
        "CIFAR-100, BEiT-large: within 1 point of their 83.0 %, likewise",
        ("cifar100_beit_large",), 1.0, 0.83, within=0.01, why_not=NO_WEIGHTS,
    ),
)  # fmt: skip


def verdicts(points: Sequence[Point], aims: Sequence[Aim] = AIMS) -> list[Verdict]:
    """Return how each aim was done."""
    found = []
    for aim in aims:
        against = aim.against
        if isinstance(against, tuple):
            reference = best(points, against, aim.against_at)
            against = None if reference is None else reference.mean
        found.append(Verdict(aim, best(points, aim.of, aim.at), None if against is None else against - aim.within))
    return found


def best(points: Sequence[Point], configs: Sequence[str], target: float) -> Point | None:
    """Return the point with the largest mean of some configurations at one epsilon; None if there is none."""
    those = [point for point in points if point.config in configs and point.target == target]
    return max(those, key=lambda point: point.mean, default=None)
