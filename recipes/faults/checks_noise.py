"""Checks of the noise: what is released of steps whose examples have no gradient must be Gaussian, fresh, complete."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from .findings import Finding, angle_p, at_most, binomial_p, by_p, variance_p
from .lab import CRASH_AT, SPARSE, SPARSE_SIZE, Lab


TAILS = (3.0, 4.0)
ZERO = 2**-22  # at most so often is a pair of draws 0
REPEATED = 0.05  # share of equal magnitudes; of 10^5 float32 draws about 1 % are, by the birthday problem


def scale(lab: Lab) -> Finding:
    """The variance is (sigma C)^2: in all, in every step, in every parameter and in every coordinate."""
    found: list[float] = []
    for seen, noise in zip((lab.plain, lab.sparse), lab.noise, strict=True):
        squares = noise.square().numpy()
        found.append(float(variance_p(squares.sum(), squares.size)))
        for axis in (0, 1):
            values = variance_p(squares.sum(axis), squares.shape[axis])
            found.append(min(1.0, float(np.min(values)) * len(values)))
        parts = [part.square() for part in seen.by_parameter(noise).values()]
        values = [float(variance_p(part.sum().numpy(), part.numel())) for part in parts]
        found.append(min(1.0, min(values) * len(values)))
    total, count = sum(float(noise.square().sum()) for noise in lab.noise), sum(noise.numel() for noise in lab.noise)
    return by_p([*found, float(variance_p(total, count))])


def shape(lab: Lab) -> Finding:
    """It is Gaussian: the whole distribution (Kolmogorov-Smirnov), and how often 3 and 4 deviations are exceeded."""
    found: list[float] = []
    for noise in lab.noise:
        values = noise.flatten().numpy()
        found.append(float(stats.kstest(values, "norm").pvalue))
        for tail in TAILS:
            found.append(float(binomial_p(int((np.abs(values) > tail).sum()), values.size, 2 * stats.norm.sf(tail))))
    return by_p(found)


def resolution(lab: Lab) -> Finding:
    """It is drawn in float32 or better: hardly two coordinates have the same magnitude."""
    shares = [1 - noise.abs().unique().numel() / noise.numel() for noise in lab.noise]
    return at_most(max(shares), REPEATED, "share of repeated magnitudes")


def across_steps(lab: Lab) -> Finding:
    """The noise of a step says nothing of another step's."""
    return by_p(angle_p(noise) for noise in lab.noise)


def across_coordinates(lab: Lab) -> Finding:
    """The noise of a coordinate says nothing of another coordinate's, whatever parameter it belongs to."""
    return by_p(angle_p(noise.T) for noise in lab.noise)


def across_runs(lab: Lab) -> Finding:
    """Two runs share no noise."""
    first, second = lab.noise
    return by_p([angle_p(first, second)])


def after_resume(lab: Lab) -> Finding:
    """A resumed run repeats none of the noise that was drawn before, for steps that were lost neither."""
    first, second = lab.interrupted
    return by_p([angle_p(first.matrix, second.matrix)], f" over {CRASH_AT} + {len(second.released)} steps")


def over_ranks(lab: Lab) -> Finding:
    """The sum over two processes has the noise once, and that of different steps is independent."""
    noise = lab.noise_over_ranks
    return by_p([float(variance_p(noise.square().sum().numpy(), noise.numel())), angle_p(noise)])


def empty_steps(lab: Lab) -> Finding:
    """A step that draws nobody is released as noise and charged, and such steps come as often as they should."""
    seen, steps = lab.sparse, len(lab.sparse.released)
    empty = [step for step, rows in enumerate(seen.read) if not rows]
    silent = sum(not bool(torch.count_nonzero(seen.released[step])) for step in empty)
    chance = (1 - SPARSE["logical_batch_size"] / SPARSE_SIZE) ** SPARSE_SIZE
    found = by_p([float(binomial_p(len(empty), steps, chance))], f", {silent} of {len(empty)} without noise")
    uncharged = seen.charged < steps
    return Finding(found.alarm or silent > 0 or uncharged, found.value + (", not all charged" if uncharged else ""))


def complete(lab: Lab) -> Finding:
    """No coordinate of any parameter is released without noise, but for draws that happen to be 0."""
    bare, drawn = sum(int(noise.eq(0).sum()) for noise in lab.noise), sum(noise.numel() for noise in lab.noise)
    # Box and Muller's radius is 0 once in 2^24 float32 draws and gives two zeros, so pairs are counted, generously.
    p = float(stats.binom.sf(bare // 2 - 1, drawn // 2, ZERO))
    return by_p([p], f", {bare} of {drawn} coordinates without noise")
