"""Checks of what is newer than single examples by index: units of several, streams, and models in shards."""

from __future__ import annotations

import numpy as np

from .checks_sums import EXACT, ROUNDING
from .data import SIZES
from .findings import Finding, angle_p, at_most, binomial_p, by_p, equal, pairs_p, variance_p
from .lab import Lab
from .shards import RANKS
from .streams import STREAM_BATCH, STREAM_SIZE, WINDOW
from .units import MOST, UNIT_BATCH


UNIT_RATE, STREAM_RATE = UNIT_BATCH / len(SIZES), STREAM_BATCH / STREAM_SIZE
LAGS = (1, 2, 3, 5, WINDOW, 2 * WINDOW)


def unit_sum(lab: Lab) -> Finding:
    """The released sum over units is that of the loop: the gradients of the rows of each, clipped as one."""
    return at_most(max(lab.unit_errors), EXACT, "relative error")


def unit_sensitivity(lab: Lab) -> Finding:
    """Zeroing out one unit, all of its rows together, moves the sum by at most C."""
    return at_most(max(lab.unit_moved) - 1, ROUNDING, "moved beyond C by")


def unit_rows(lab: Lab) -> Finding:
    """A unit that is drawn takes part once, by as many different rows of its own as it has, at most k."""
    wrong = 0
    for step in lab.unit_draws:
        owners = [{lab.owners[row] for row in unit} for unit in step]
        wrong += len(set().union(*owners)) != len(step) or any(len(found) != 1 for found in owners)
        for unit, found in zip(step, owners, strict=True):
            wrong += len(set(unit)) != len(unit) or len(unit) != min(MOST, SIZES[min(found)])
    return equal(wrong, 0, "units and steps with other rows")


def unit_rate(lab: Lab) -> Finding:
    """Every unit takes part at the sample rate whatever its size, and every row of it as often as any other."""
    steps = len(lab.unit_draws)
    units = binomial_p(lab.unit_inclusions, steps, UNIT_RATE)
    shares = np.array([UNIT_RATE * min(MOST, SIZES[owner]) / SIZES[owner] for owner in lab.owners])
    rows = np.array([binomial_p(int(n), steps, p) for n, p in zip(lab.row_inclusions, shares.tolist(), strict=True)])
    return by_p([min(1.0, float(found.min()) * len(found)) for found in (units, rows)])


def stream_rate(lab: Lab) -> Finding:
    """Each row of a stream takes part at the sample rate, one by one too, and batch sizes vary as they should."""
    found = lab.stream_inclusions
    sizes, single = found.sum(1), binomial_p(found.sum(0), len(found), STREAM_RATE)
    squares = float(((sizes - STREAM_BATCH) ** 2).sum()) / (STREAM_BATCH * (1 - STREAM_RATE))
    return by_p([
        float(binomial_p(int(found.sum()), found.size, STREAM_RATE)), min(1.0, float(single.min()) * len(single)),
        float(variance_p(squares, len(sizes))),
    ])  # fmt: skip


def stream_across_steps(lab: Lab) -> Finding:
    """A row's part in one step says nothing of another step's, within a window and from one window to the next."""
    found = lab.stream_inclusions
    pairs = [pairs_p(int((found[:-lag] & found[lag:]).sum()), (len(found) - lag) * STREAM_SIZE, STREAM_RATE)
             for lag in LAGS]  # fmt: skip
    often = found.reshape(-1, WINDOW, STREAM_SIZE).sum(1)  # of each row in each window: binomial
    squares = float(((often - WINDOW * STREAM_RATE) ** 2).sum()) / (WINDOW * STREAM_RATE * (1 - STREAM_RATE))
    return by_p([*pairs, float(variance_p(squares, often.size))])


def stream_sum(lab: Lab) -> Finding:
    """The released sum is that over the rows of the stream that were drawn for the step, and of nobody else."""
    return at_most(max(lab.stream_errors), EXACT, "relative error")


def shard_noise(lab: Lab) -> Finding:
    """Every process's shards have noise of (sigma C)^2, independent over steps and of the other process's."""
    shards = [shard.noise for shard in lab.shards]
    found = [angle_p(noise) for noise in shards]
    for noise in shards:
        squares = noise.square().sum(1).numpy()
        found.append(float(variance_p(squares.sum(), noise.numel())))
        found.append(min(1.0, float(variance_p(squares, noise.shape[1]).min()) * len(squares)))
    width = min(noise.shape[1] for noise in shards)
    return by_p([*found, *(angle_p(shards[0][:, :width], other[:, :width]) for other in shards[1:])])


def shard_sum(lab: Lab) -> Finding:
    """The sum over all processes is that of the loop over the examples that they read, norms over all parameters."""
    steps = [sum((shard.read[step] for shard in lab.shards), []) for step in range(len(lab.shards[0].read))]
    oracle = lab.shard_oracle()
    truth = oracle.sums(steps)
    errors = [(shard.sums - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(oracle.bound) for shard in lab.shards]
    read_by_all = all(any(shard.read) for shard in lab.shards) and len(lab.shards) == RANKS
    worst = max(float(error.max()) for error in errors)
    return at_most(worst if read_by_all else float("nan"), EXACT, "relative error")
