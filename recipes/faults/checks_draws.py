"""Checks of the draws: every example takes part in every step by an independent coin, and all of it is trained on."""

from __future__ import annotations

import numpy as np
from scipy import stats

from .findings import ALPHA, Finding, binomial_p, by_p, equal, pairs_p, variance_p
from .lab import DRAWN_BATCH, DRAWN_SIZE, PLAIN, PLAIN_SIZE, RANKS, Lab


RATE = DRAWN_BATCH / DRAWN_SIZE
LAGS = (1, 2, 3, 4, 5, 8)
LARGE = (28, 32)  # drawn at once, where 20 are expected
SHARED_STEPS = 40


def rate(lab: Lab) -> Finding:
    """Each example takes part at the sample rate: all together, and one by one."""
    found = lab.inclusions
    single = binomial_p(found.sum(0), len(found), RATE)
    return by_p([float(binomial_p(int(found.sum()), found.size, RATE)), min(1.0, float(single.min()) * len(single))])


def batch_sizes(lab: Lab) -> Finding:
    """Batch sizes are binomial: they vary as they should, and the largest come as often as they should."""
    sizes = lab.inclusions.sum(1)
    squares = float(((sizes - DRAWN_BATCH) ** 2).sum()) / (DRAWN_BATCH * (1 - RATE))
    found = [float(variance_p(squares, len(sizes)))]  # chi2 in the limit: the binomial has no excess to speak of
    for limit in LARGE:
        chance = float(stats.binom.sf(limit, DRAWN_SIZE, RATE))
        found.append(float(binomial_p(int((sizes > limit).sum()), len(sizes), chance)))
    return by_p(found, f", sizes {sizes.min()} to {sizes.max()}")


def across_steps(lab: Lab) -> Finding:
    """Taking part in a step says nothing of taking part in another one, for several distances."""
    found = lab.inclusions
    pairs = ((found[:-lag] & found[lag:], (len(found) - lag) * DRAWN_SIZE) for lag in LAGS)
    return by_p(pairs_p(int(both.sum()), trials, RATE) for both, trials in pairs)


def across_examples(lab: Lab) -> Finding:
    """Taking part says nothing of another example's taking part in the same step."""
    found = lab.inclusions
    together = (found.T.astype(float) @ found.astype(float))[np.triu_indices(DRAWN_SIZE, 1)].astype(int)
    values = binomial_p(together, len(found), RATE**2)
    return by_p([min(1.0, float(values.min()) * len(values))])


def no_repeats(lab: Lab) -> Finding:
    """Nobody takes part twice in a step, and no two steps are the same draw."""
    twice = sum(len(indices) - len(set(indices)) for indices in lab.draws)
    draws = {tuple(sorted(indices)) for indices in lab.draws}
    return equal((twice, len(lab.draws) - len(draws)), (0, 0), "(repeats in a step, repeated steps)")


def key_is_fresh(lab: Lab) -> Finding:
    """Two runs with equal arguments draw independently: as many common members as by chance."""
    steps = [(set(a), set(b)) for a, b in zip(lab.draws, lab.drawn("draws-again")[0], strict=True)]
    common = sum(len(a & b) for a, b in steps)
    return by_p([float(binomial_p(common, len(steps) * DRAWN_SIZE, RATE**2))])


def after_resume(lab: Lab) -> Finding:
    """A resumed run draws anew, for steps that were lost too: no draw comes twice."""
    first, second = lab.interrupted
    repeated = sum(rows in first.read for rows in second.read)
    q = PLAIN["logical_batch_size"] / PLAIN_SIZE
    chance = len(first.read) * len(second.read) * (q**2 + (1 - q) ** 2) ** PLAIN_SIZE
    if chance > ALPHA:
        raise ValueError(f"equal draws come by chance with probability {chance}: enlarge the data set")
    return equal(repeated, 0, "repeated draws")


def over_ranks(lab: Lab) -> Finding:
    """Shares of processes are disjoint and together the draw."""
    draws = lab.drawn("shares")[1]
    wrong = 0
    for step in range(SHARED_STEPS):
        shares = [list(draws.share(step, rank, RANKS)) for rank in range(RANKS)]
        wrong += sorted(sum(shares, [])) != sorted(draws.share(step, 0, 1))
    return equal(wrong, 0, "steps whose shares are not the draw")
