"""The plan of one step: ghost, keep or drop for every use, the fastest that a bound on memory allows."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .affine import AffineShape
from .cost import Choice, NormRule, allowed, choose, held, non_private_seconds, seconds, traffic_seconds
from .gradients import Instantiated, PerExampleGradient
from .shared import shapes


# Up to this many bytes are held whatever the bound says: the estimate of so small a step is mostly overhead.
_SMALL = 2**26
# Modelled floating point operations of a batch from which on kernels are timed: below, the clock shows only noise.
_WORTH_TIMING = 1e8
# Memory has a price: a choice that holds less is taken where it costs at most this share of the step's time per share
# of its peak, one percent for four percent. Larger physical batches are worth about that.
_TIME_FOR_MEMORY = 0.25
# Of several numbers of switches that come this close to the same peak, in its own units, the smallest is taken.
_SAME_PEAK = 0.01
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


@dataclass(frozen=True)
class Switch:
    """A use that could hold less.

    Attributes:
        slot, choice: which use, and by which choice.
        slower: how much longer the step takes, of the non-private step.
        numbers: per example that are no longer held.
    """

    slot: Any
    choice: Choice
    slower: float
    numbers: int


@dataclass
class Planner:
    """Chooses by time under a bound on memory, and learns the times of this machine where it is told to measure.

    The bound: the estimated peak of one pass (`private_peak`), which holds activations and output gradients or the
    gradients of single examples for the clipped sum, stays below `memory_bound` times that of the non-private step
    (`non_private_peak`). Both leave out the workspaces of kernels, which are bounded. Uses are switched to the choice
    that holds less, in order of the time that this costs per byte; if even the least is too much, and two passes,
    which hold nothing but keep what was saved to their end (`two_pass_peak`), need less, there are two. Within the
    bound uses are switched further while a lower peak is cheap: one percent of the step's time for four percent of
    it. Up to 64 MiB are always allowed. With `backward_passes=2`, or any rule but "auto", there is nothing to weigh.
    Everything here follows from sizes, nothing from the examples.

    Args:
        memory_bound: ratio to the non-private step, 1.05 for five percent more.
        measure: time the kernels that come into question on the first batch of each shape; the choices may then differ
            from run to run, and the results by rounding. Otherwise times come from a model of operations and traffic.
    """

    memory_bound: float = 1.05
    measure: bool = False
    _measured: dict[tuple, float] = field(default_factory=dict)
    _gradients: dict[tuple, float] = field(default_factory=dict)

    def plan(
        self, slots: Sequence[Any], n: int, rule: NormRule, backward_passes: int, saved_bytes: int
    ) -> Plan:
        """The plan for the uses `slots` of a batch of `n`, in order; `saved_bytes` as for `non_private_peak`."""
        shaped = shapes(slots)
        if rule is not NormRule.AUTO:
            return Plan({s: choose(rule, shape, backward_passes) for s, shape in shaped.items()}, backward_passes)
        fastest = {s: self._fastest(s.operation, shape, backward_passes) for s, shape in shaped.items()}
        if backward_passes == 2:
            return Plan(fastest, 2)
        plain = non_private_peak(slots, n, saved_bytes)
        switches = self._cheapest_switches(shaped, fastest)

        def after(count: int) -> dict[Any, Choice]:
            return fastest | {switch.slot: switch.choice for switch in switches[:count]}

        def peak(count: int) -> float:
            return private_peak(slots, after(count), n, saved_bytes)

        # every switch holds less than before, so the first number of them that fits is found by bisection
        budget = max(_SMALL, self.memory_bound * plain)
        fits = bisect_left(range(len(switches) + 1), True, key=lambda count: peak(count) <= budget)
        if fits > len(switches) and two_pass_peak(slots, n, saved_bytes) < peak(len(switches)):
            return Plan({s: self._fastest(s.operation, shape, 2) for s, shape in shaped.items()}, 2)
        fits = min(fits, len(switches))
        if peak(fits) > _SMALL:
            fits = _worthwhile(fits, switches, peak, plain, n)
        return Plan(after(fits), 1)

    def norms(self, slot: Any, gradient: PerExampleGradient, choice: Choice | None) -> tuple[Tensor, Any]:
        """Squared norms `[n]` of one use, and what to hold for its sum."""
        self.learn(slot, gradient)
        if choice is Choice.GHOST:
            return gradient.ghost_squared_norms(), gradient
        if choice is Choice.KEEP:
            gradient = Instantiated(gradient.instantiate())
        return gradient.squared_norms(), gradient

    def learn(self, slot: Any, gradient: PerExampleGradient) -> None:
        """Time the kernels that come into question for one use, where the planner measures."""
        if self.measure and slot.shape is not None:
            self._time(slot.operation, slot.shape, gradient, slot.uses.n)

    def expected(self, operation: str, shape: AffineShape, choice: Choice) -> float:
        """Seconds per example beyond a non-private step: measured if there is a measurement, else modelled."""
        alone = _alone(shape)
        measured = self._measured.get((operation, alone, choice))
        if measured is None:
            return seconds(choice, shape)
        return measured * shape.gram_flops / alone.gram_flops if choice is Choice.GHOST else measured

    def _fastest(self, operation: str, shape: AffineShape, backward_passes: int) -> Choice:
        return min(allowed(backward_passes), key=lambda choice: self.expected(operation, shape, choice))

    def _cheapest_switches(self, shaped: dict[Any, AffineShape], now: dict[Any, Choice]) -> list[Switch]:
        """Uses that could hold less, and by which choice; least additional time per number saved first."""
        flops, found = sum(shape.flops for shape in shaped.values()), []
        for slot, shape in shaped.items():
            lean = [c for c in allowed(1) if held(c, shape) < held(now[slot], shape)]
            if lean:
                choice = min(lean, key=lambda c: self.expected(slot.operation, shape, c))
                slower = self.expected(slot.operation, shape, choice) - self.expected(slot.operation, shape, now[slot])
                # of the use's own time, measured or modelled like the difference, and so of the step's
                slower *= shape.flops / flops / self._non_private(slot.operation, shape)
                found.append(Switch(slot, choice, slower, held(now[slot], shape) - held(choice, shape)))
        return sorted(found, key=lambda switch: switch.slower / switch.numbers)

    def _non_private(self, operation: str, shape: AffineShape) -> float:
        """Seconds per example of the non-private step in one use."""
        gradient = self._gradients.get((operation, _alone(shape)))
        return non_private_seconds(shape.flops) if gradient is None else 3 * gradient

    def _time(self, operation: str, shape: AffineShape, gradient: PerExampleGradient, n: int) -> None:
        """Time the choices once per shape, where the model is not sure of them and the batch is large enough."""
        ghost, drop = seconds(Choice.GHOST, shape), seconds(Choice.DROP, shape)
        sure = max(ghost, drop) > _SURE * min(ghost, drop)
        if sure or n * shape.flops < _WORTH_TIMING or (operation, shape, Choice.DROP) in self._measured:
            return
        dropped = _seconds(gradient.squared_norms)
        # Kept gradients save the sum's own product, and are written once and read once more.
        summed = _seconds(lambda: gradient.weighted_sum(None))
        kept = dropped - summed + n * traffic_seconds(2 * shape.weight_elements)
        times = {Choice.GHOST: _seconds(gradient.ghost_squared_norms), Choice.DROP: dropped, Choice.KEEP: kept}
        self._measured |= {(operation, shape, choice): spent / n for choice, spent in times.items()}
        self._gradients[operation, shape] = summed / n


def _alone(shape: AffineShape) -> AffineShape:
    """The sizes as which a use is measured: its activation shared with no other."""
    return shape if shape.readers == 1 else replace(shape, readers=1)


def _worthwhile(
    fits: int, switches: Sequence[Switch], peak: Callable[[int], float], plain: float, n: int
) -> int:
    """How many of the switches to take, at least `fits`, where memory has its price.

    Args:
        fits: as many keep the bound.
        switches: in order of their price per number.
        peak: bytes of one pass after so many switches.
        plain: bytes of the non-private step.
        n: examples.
    """
    affordable = [_TIME_FOR_MEMORY * 4 * n * switch.numbers / plain >= switch.slower for switch in switches]
    cheap = max(fits, sum(affordable))  # in order of price, so the affordable ones come first
    # what is held is not always what makes the peak: no switch beyond those that lower it
    enough = peak(cheap) + _SAME_PEAK * plain
    count = bisect_left(range(cheap + 1), True, lo=fits, key=lambda count: peak(count) <= enough)
    slower = sum(switch.slower for switch in switches[fits:count])
    return count if slower <= _TIME_FOR_MEMORY * (peak(fits) - peak(count)) / plain else fits


def non_private_peak(slots: Sequence[Any], n: int, saved_bytes: int) -> float:
    """Estimated bytes of the non-private step's peak, beyond the parameters and the batch.

    What is saved for the backward pass is released use by use, in proportion to activation and output gradient, while
    the gradients come into being; at each use the gradients of its output and its input are there for a moment.

    Args:
        slots: all uses, in order.
        n: examples.
        saved_bytes: what the forward pass saved.
    """
    gradients, peak = 0, 0.0
    for slot, saved, passing in _releasing(slots, n, saved_bytes):
        gradients += slot.theta.tensor.nbytes
        peak = max(peak, saved + passing + gradients)
    return peak


def private_peak(slots: Sequence[Any], choices: Mapping[Any, Choice], n: int, saved_bytes: int) -> float:
    """Estimated bytes of the peak of one pass by `choices` on `n` examples, beyond the parameters and the batch.

    First what is held comes into being, while what is saved is released; then the sums do, while that is released.
    """
    bytes_held = {slot: 4 * n * held(choice, slot.shape) for slot, choice in choices.items()}
    holding, peak = 0, 0.0
    for slot, saved, passing in _releasing(slots, n, saved_bytes):
        holding += bytes_held.get(slot, 0)
        own = bytes_held.get(slot, 0) * (choices.get(slot) is not Choice.KEEP)  # is saved or passing
        peak = max(peak, saved + passing + holding - own)
    peak = max(peak, holding)
    for slot in reversed(slots):
        holding += slot.theta.tensor.nbytes
        peak = max(peak, holding)
        holding -= bytes_held.get(slot, 0)
    return peak


def two_pass_peak(slots: Sequence[Any], n: int, saved_bytes: int) -> float:
    """Estimated bytes of the peak of two passes: the first keeps for the second all that the forward pass saved."""
    return saved_bytes + max((passing for _, _, passing in _releasing(slots, n, saved_bytes)), default=0)


def _releasing(slots: Sequence[Any], n: int, saved_bytes: int) -> Iterator[tuple[Any, float, int]]:
    """Uses in the order of the backward pass, what of the saved bytes is still there, and what only passes by."""
    sizes = {slot: 0 if slot.shape is None else slot.shape.operand_elements for slot in slots}
    total, saved = max(1, sum(sizes.values())), float(saved_bytes)
    for slot in reversed(slots):
        yield slot, saved, 4 * n * sizes[slot]
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
