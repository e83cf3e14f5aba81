"""Checking the sides, taking turns step by step, and exact peaks of memory."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_dpvision.noise import NoiseSource, add_noise

from .cases import Case, Trained, build, freeze, random_batch
from .floor import Reasons, reasons
from .sides import Batch, Loop, NonPrivate, Ours, Side, disagreement


EXAMPLES_CHECKED = 3
SAME_PARAMETERS = "non-private, same parameters"  # the side that trains what ours does, where that is not everything
LARGER, LARGEST_PEAK = (2, 4, 8), 4 * 2**30  # batch sizes for the fit, in case batches; bytes


@dataclass(frozen=True)
class Settings:
    """How the cases are measured.

    Args:
        rounds: in which the non-private step and our default take part.
        other_rounds: in which the remaining sides take part, the first ones.
        slow: a side that takes more than this many non-private steps takes part in one round only.
        memory_gib: for the largest batch.
        device: where everything runs.
        seed: of weights and images.
    """

    rounds: int
    other_rounds: int
    slow: float
    memory_gib: float
    device: torch.device
    seed: int


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and number of some measurements."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [*values]
        return cls(median, low, high, len(values))


@dataclass
class SideResult:
    """What one side did in one case.

    Attributes:
        gradient_error: relative to the loop over single examples; None if it could not run.
        fault: what is wrong with the gradients, or why it cannot run.
        cpu, wall: seconds of the timed steps, by round.
        peaks: batch size to bytes allocated at once beyond what was there when the step began.
        resident: bytes of parameters and buffers.
    """

    name: str
    ours: bool
    gradient_error: float | None = None
    fault: str | None = None
    cpu: dict[int, float] = field(default_factory=dict)
    wall: dict[int, float] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)
    resident: int = 0


@dataclass
class CaseResult:
    """All sides of a case; the first one is the non-private step that the ratios refer to.

    Attributes:
        noise: seconds of CPU time to draw and add the noise of one step for all trained parameters; wall time on CUDA.
        clip_norm: the middle norm of the examples that were checked.
        reasons: why our default does not cost less, if it could run.
    """

    case: Case
    parameters: int
    trained: int
    clip_norm: float
    sides: list[SideResult]
    noise: list[float]
    wall_clock: bool
    reasons: Reasons | None = None

    def times(self, side: SideResult) -> dict[int, float]:
        """Seconds by round: process CPU time, on CUDA wall time."""
        return side.wall if self.wall_clock else side.cpu

    def time_ratio(self, side: SideResult) -> Spread | None:
        """Over the rounds that the side took part in: its step over the non-private step of the same round."""
        return self.ratio_of(self.times(side), self.times(self.sides[0]))

    def wall_ratio(self, side: SideResult) -> Spread | None:
        """The same by wall time."""
        return self.ratio_of(side.wall, self.sides[0].wall)

    def least_ratio(self, side: SideResult) -> float | None:
        """Shortest step over the shortest non-private step: other work on the machine only ever adds."""
        seconds = self.times(side)
        return min(seconds.values()) / min(self.times(self.sides[0]).values()) if seconds else None

    @staticmethod
    def ratio_of(seconds: Mapping[int, float], base: Mapping[int, float]) -> Spread | None:
        """Ratios round by round."""
        return Spread.of([taken / base[number] for number, taken in seconds.items()]) if seconds else None

    def memory_ratio(self, side: SideResult) -> float | None:
        """Peak over the peak of the non-private step at the case's batch size."""
        n = self.case.batch_size
        return side.peaks[n] / self.sides[0].peaks[n] if n in side.peaks else None

    def noise_ratio(self) -> float:
        """Median time of the noise over the median non-private step."""
        return statistics.median(self.noise) / statistics.median(self.times(self.sides[0]).values())

    def find(self, name: str) -> SideResult | None:
        """The side of this name."""
        return next((side for side in self.sides if side.name == name), None)


def own_sides(case: Case) -> list[Side]:
    """The non-private step, our default, and the variants of it."""
    sides: list[Side] = [NonPrivate(), Ours()]
    if case.trained in (Trained.BIAS, Trained.HEAD):
        sides.append(NonPrivate(SAME_PARAMETERS))
    return sides + [Ours(*variant) for variant in case.variants]


def measure(case: Case, sides: Sequence[Side], settings: Settings, say: Callable[[str], None]) -> CaseResult:
    """Check every side against the loop, then take peaks of memory, then time them in turns."""
    base = build(case, settings.seed).to(settings.device)
    model = copy.deepcopy(base)
    freeze(model, case.trained)
    if case.trained is Trained.LAYERS:
        base = model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    results = check(base, model, sides, case, settings, say)
    result = CaseResult(
        case, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained.values()),
        results[0][1].clip_norm, [found for found, _ in results], [], settings.device.type == "cuda",
    )  # fmt: skip
    running = [(found, side) for found, side in results if found.gradient_error is not None]
    batch = random_batch(case, case.batch_size, settings.seed, settings.device)
    gc.collect()
    warm = []  # the steps that peaks are taken of serve as warm-up
    for found, side in running:
        start = time.perf_counter()
        found.peaks[case.batch_size] = peak(lambda side=side: side.step(batch), settings.device)
        warm.append(time.perf_counter() - start)
    say(f"  peaks taken, {sum(warm):.0f} s")
    slow = [seconds > settings.slow * warm[0] for seconds in warm]
    take_turns(running, slow, batch, settings, say)
    sums = {name: torch.zeros_like(p) for name, p in trained.items()}
    source = NoiseSource.from_os_entropy(settings.device)
    for _ in range(1 + settings.other_rounds):
        cpu, wall = timed(lambda: add_noise(sums, 1.0, source), settings.device)
        result.noise.append(wall if result.wall_clock else cpu)
    del result.noise[0]  # the first one warms up
    if running[1:] and isinstance(running[1][1], Ours):
        result.reasons = reasons(base, model, running[0][1], running[1][1], batch)
        say("  operations counted, steps profiled")
    if case.largest_batch:
        compared = [pair for place, pair in enumerate(running) if place < 2 or not pair[0].ours]
        take_larger_peaks(compared, case, settings, say)
    return result


def check(
    base: nn.Module,
    model: nn.Module,
    sides: Sequence[Side],
    case: Case,
    settings: Settings,
    say: Callable[[str], None],
) -> list[tuple[SideResult, Side]]:
    """Prepare every side and hold one step of it to the loop; the first side gets `base`, the others `model`.

    A side that raises is reported with its error and takes no further part; one with wrong gradients does, marked.
    """
    batch = random_batch(case, min(EXAMPLES_CHECKED, case.batch_size), settings.seed + 1, settings.device)
    loop = Loop.over(model, batch)
    clip_norm = float(loop.norms.median())
    checked = []
    for number, side in enumerate(sides):
        own, truth = (base, Loop.over(base, batch)) if number == 0 and base is not model else (model, loop)
        found = SideResult(side.name, side.ours)
        found.resident = sum(t.numel() * t.element_size() for t in (*own.parameters(), *own.buffers()))
        try:
            side.prepare(own, clip_norm)
            found.gradient_error, found.fault = disagreement(side.step(batch), side.truth(truth), side.tolerance)
        except Exception as error:  # whatever a peer raises is a finding and enters the report
            found.fault = f"cannot run: {type(error).__name__}: {first_words(error)}"
        say(f"  {side.name}: {found.fault or f'gradients agree, {found.gradient_error:.0e}'}")
        checked.append((found, side))
    return checked


def first_words(error: Exception) -> str:
    """The beginning of an error's message; Opacus prints whole models."""
    message = (str(error).strip() or "no message").splitlines()[0].split("\\n")[0].split(". ")[0]
    return message if len(message) <= 140 else f"{message[:140].rsplit(' ', 1)[0]} ..."


def take_turns(
    running: Sequence[tuple[SideResult, Side]],
    slow: Sequence[bool],
    batch: Batch,
    settings: Settings,
    say: Callable[[str], None],
) -> None:
    """Time the sides' steps round by round; the first two take part in every round, in rotating order."""
    for number in range(settings.rounds):
        present = [
            pair for place, pair in enumerate(running)
            if place < 2 or number < (1 if slow[place] else settings.other_rounds)
        ]  # fmt: skip
        start = number % len(present)
        gc.collect()
        for found, side in present[start:] + present[:start]:
            found.cpu[number], found.wall[number] = timed(lambda side=side: side.step(batch), settings.device)
        say(f"  round {number + 1} of {settings.rounds}: {sum(found.wall[number] for found, _ in present):.0f} s")


def timed(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the process CPU time and the wall time of one call, in seconds."""
    synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    kept = step()
    synchronize(device)
    taken = time.process_time() - cpu, time.perf_counter() - wall
    del kept
    return taken


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that one call had allocated at once, beyond what was there before.

    On the CPU every allocation and release of torch's allocator is in the profiler's record, on CUDA the allocator
    keeps the peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def take_larger_peaks(
    running: Sequence[tuple[SideResult, Side]], case: Case, settings: Settings, say: Callable[[str], None]
) -> None:
    """Take peaks at two, four and eight times the batch size where they should stay in bounds, else at half of it."""

    def take(size: int, sides: Sequence[tuple[SideResult, Side]]) -> None:
        batch = random_batch(case, size, settings.seed, settings.device)
        for found, side in sides:
            found.peaks[size] = peak(lambda: side.step(batch), settings.device)  # noqa: B023, called at once
        say(f"  peaks at batch {size} taken")

    for size in (factor * case.batch_size for factor in LARGER):
        take(
            size, [pair for pair in running if max(pair[0].peaks.values()) * size <= LARGEST_PEAK * max(pair[0].peaks)]
        )
    take(case.batch_size // 2, [pair for pair in running if len(pair[0].peaks) == 1])


def largest_batch(side: SideResult, memory_gib: float) -> int | None:
    """Return how many examples fit: `(memory - resident - a) / b`, with the line `a + b n` through two peaks.

    These are the peaks of the two largest batches that were run: below, where gradients and workspaces outweigh
    activations, the slope is another one. None where one batch size was run. It is an extrapolation.
    """
    if len(side.peaks) < 2:
        return None
    (small, low), (large, high) = sorted(side.peaks.items())[-2:]
    slope = (high - low) / (large - small)
    return int(large + (memory_gib * 2**30 - side.resident - high) / slope)
