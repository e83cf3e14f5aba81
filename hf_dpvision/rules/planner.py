"""The plan of one step: ghost, keep or drop for every use, the fastest that a bound on memory allows."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .affine import AffineShape
from .cost import Choice, NormRule, allowed, choose, held, seconds, traffic_seconds
from .gradients import Instantiated, PerExampleGradient


# Up to this many bytes are held whatever the bound says: the estimate of so small a step is mostly overhead.
_SMALL = 2**26
# Modelled floating point operations of a batch from which on kernels are timed: below, the clock shows only noise.
_WORTH_TIMING = 1e8
# Where ghost and instantiation differ by this factor, the model is believed and nothing is timed.
_SURE = 4


@dataclass(frozen=True)
class Plan:
    """What is done with each use, and in how many backward passes.

    Attributes:
        choices: by use; uses that are not in it are small and always instantiated.
        backward_passes: 1 or 2.
    """

    choices: dict[Any, Choice]
    backward_passes: int


@dataclass
class Planner:
    """Chooses by time under a bound on memory, and learns the times of this machine where it is told to measure.

    The bound: the estimated peak of one pass (`private_peak`), which holds activations and output gradients or the
    gradients of single examples for the clipped sum, stays below `memory_bound` times that of the non-private step
    (`non_private_peak`). Both leave out the workspaces of kernels, which are bounded. Uses are switched to the choice
    that holds less, in order of the time that this costs per byte; if even the least is too much, two passes hold
    nothing. Up to 64 MiB are always allowed. With `backward_passes=2`, or any rule but "auto", there is nothing to
    weigh.

    Args:
        memory_bound: ratio to the non-private step, 1.05 for five percent more.
        measure: time the kernels that come into question on the first batch of each shape; the choices may then differ
            from run to run, and the results by rounding. Otherwise times come from a model of operations and traffic.
    """

    memory_bound: float = 1.05
    measure: bool = False
    _measured: dict[tuple, float] = field(default_factory=dict)

    def plan(
        self, slots: Sequence[Any], n: int, rule: NormRule, backward_passes: int, saved_bytes: int
    ) -> Plan:
        """The plan for the uses `slots` of a batch of `n`, in order; `saved_bytes` as for `non_private_peak`."""
        shaped = {slot: slot.shape for slot in slots if slot.shape is not None}
        if rule is not NormRule.AUTO:
            return Plan({s: choose(rule, shape, backward_passes) for s, shape in shaped.items()}, backward_passes)
        fastest = {s: self._fastest(s.operation, shape, backward_passes) for s, shape in shaped.items()}
        if backward_passes == 2:
            return Plan(fastest, 2)
        budget = max(_SMALL, self.memory_bound * non_private_peak(slots, saved_bytes))
        switches = self._cheapest_switches(shaped, fastest)

        def after(count: int) -> dict[Any, Choice]:
            return fastest | dict(switches[:count])

        # every switch holds less than before, so the first number of them that fits is found by bisection
        fits = bisect_left(
            range(len(switches) + 1), True, key=lambda k: private_peak(slots, after(k), n, saved_bytes) <= budget
        )
        if fits > len(switches):
            return Plan({s: self._fastest(s.operation, shape, 2) for s, shape in shaped.items()}, 2)
        return Plan(after(fits), 1)

    def norms(self, slot: Any, gradient: PerExampleGradient, choice: Choice | None) -> tuple[Tensor, Any]:
        """Squared norms `[n]` of one use, and what to hold for its sum."""
        if self.measure and choice is not None:
            self._time(slot.operation, slot.shape, gradient, slot.uses.n)
        if choice is Choice.GHOST:
            return gradient.ghost_squared_norms(), gradient
        if choice is Choice.KEEP:
            gradient = Instantiated(gradient.instantiate())
        return gradient.squared_norms(), gradient

    def expected(self, operation: str, shape: AffineShape, choice: Choice) -> float:
        """Seconds per example beyond a non-private step: measured if there is a measurement, else modelled."""
        return self._measured.get((operation, shape, choice), seconds(choice, shape))

    def _fastest(self, operation: str, shape: AffineShape, backward_passes: int) -> Choice:
        return min(allowed(backward_passes), key=lambda choice: self.expected(operation, shape, choice))

    def _cheapest_switches(self, shaped: dict[Any, AffineShape], now: dict[Any, Choice]) -> list[tuple[Any, Choice]]:
        """Uses that could hold less, and by which choice; least additional time per number saved first."""
        found = []
        for slot, shape in shaped.items():
            lean = [c for c in allowed(1) if held(c, shape) < held(now[slot], shape)]
            if lean:
                choice = min(lean, key=lambda c: self.expected(slot.operation, shape, c))
                slower = self.expected(slot.operation, shape, choice) - self.expected(slot.operation, shape, now[slot])
                found.append((slower / (held(now[slot], shape) - held(choice, shape)), len(found), slot, choice))
        return [(slot, choice) for _, _, slot, choice in sorted(found)]

    def _time(self, operation: str, shape: AffineShape, gradient: PerExampleGradient, n: int) -> None:
        """Time the choices once per shape, where the model is not sure of them and the batch is large enough."""
        ghost, drop = seconds(Choice.GHOST, shape), seconds(Choice.DROP, shape)
        sure = max(ghost, drop) > _SURE * min(ghost, drop)
        if sure or n * shape.flops < _WORTH_TIMING or (operation, shape, Choice.DROP) in self._measured:
            return
        dropped = _seconds(gradient.squared_norms)
        # Kept gradients save the sum's own product, and are written once and read once more.
        kept = dropped - _seconds(lambda: gradient.weighted_sum(None)) + n * traffic_seconds(2 * shape.weight_elements)
        times = {Choice.GHOST: _seconds(gradient.ghost_squared_norms), Choice.DROP: dropped, Choice.KEEP: kept}
        self._measured |= {(operation, shape, choice): spent / n for choice, spent in times.items()}


def non_private_peak(slots: Sequence[Any], saved_bytes: int) -> float:
    """Estimated bytes of the non-private step's peak, beyond the parameters.

    What is saved for the backward pass is released use by use, in proportion to activation and output gradient, while
    the gradients come into being.

    Args:
        slots: all uses, in order.
        saved_bytes: what the forward pass saved.
    """
    gradients, peak = 0, 0.0
    for slot, saved in _releasing(slots, saved_bytes):
        gradients += slot.theta.tensor.nbytes
        peak = max(peak, saved + gradients)
    return peak


def private_peak(slots: Sequence[Any], choices: Mapping[Any, Choice], n: int, saved_bytes: int) -> float:
    """Estimated bytes of the peak of one pass by `choices` on `n` examples, beyond the parameters.

    First what is held comes into being, while what is saved is released; then the sums do, while that is released.
    """
    bytes_held = {slot: 4 * n * held(choice, slot.shape) for slot, choice in choices.items()}
    holding, peak = 0, 0.0
    for slot, saved in _releasing(slots, saved_bytes):
        holding += bytes_held.get(slot, 0)
        peak = max(peak, saved + holding - bytes_held.get(slot, 0) * (choices.get(slot) is not Choice.KEEP))
    peak = max(peak, holding)
    for slot in reversed(slots):
        holding += slot.theta.tensor.nbytes
        peak = max(peak, holding)
        holding -= bytes_held.get(slot, 0)
    return peak


def _releasing(slots: Sequence[Any], saved_bytes: int) -> Iterator[tuple[Any, float]]:
    """Uses in the order of the backward pass, and what of the saved bytes is still there at each."""
    sizes = {slot: 0 if slot.shape is None else slot.shape.operand_elements for slot in slots}
    total, saved = max(1, sum(sizes.values())), float(saved_bytes)
    for slot in reversed(slots):
        yield slot, saved
        saved -= saved_bytes * sizes[slot] / total


def _seconds(run: Any) -> float:
    """The shorter of two runs; the first one of a shape also pays for what the framework prepares."""
    spent = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # only here, while kernels are timed
        spent.append(time.perf_counter() - start)
    return min(spent)
