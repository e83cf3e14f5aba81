"""How much one training run betrays of who was in it: the arithmetic of auditing in one run.

Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Theorem 5.2. Of m examples each is in with probability 1/2, by m fair
coins. An auditor names r of them, each as in or out, and v guesses are right.

Why v is bounded. Take (epsilon, 0) first, and the coins in order. Given the output and the coins before it, a coin
shows what was guessed with probability at most e^epsilon / (1 + e^epsilon): that is Bayes' rule for a fair coin, whose
turning changes the likelihood of the output by at most e^epsilon (the coins after it are averaged over, which keeps
the inequality). So the tail of v is at most that of a binomial variable with r trials and this probability, f(v). With
delta, the output may give some coins away entirely, in expectation at most 2 m delta of them, in whatever way that is
spread: j coins with probability p_j, where the sum of j p_j is at most 2 m delta. They turn f(v) into at most
f(v) + sum_j p_j (f(v - j) - f(v)), which is largest if all of it is put where (f(v - j) - f(v)) / j is.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit
from scipy.stats import binom

from ..errors import ArgumentRefused


_LARGEST_EPSILON = 40.0  # beyond it float64 cannot tell the probability from 1
_STEP = 0.05  # the bound is the first epsilon that is not excluded, found to this and then by bisection


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely at most so many right guesses are, or more, if the run is (epsilon, delta)-differentially private.

    Args:
        canaries: m, each in with probability 1/2.
        guesses: r of them, chosen without looking at the coins.
        right: v of these.
        epsilon, delta: what is to be excluded, for zeroing out one example.

    Raises:
        ArgumentRefused: the counts are not 0 <= v <= r <= m, or epsilon or delta is out of range.
    """
    if not 0 <= right <= guesses <= canaries or not canaries:
        raise ArgumentRefused(
            f"{right=} of {guesses=} among {canaries=}: there must be 0 <= right <= guesses <= canaries, at least one."
        )
    if not (0 <= epsilon < np.inf and 0 <= delta <= 1):
        raise ArgumentRefused(f"{epsilon=}, {delta=}: no guarantee is like that. Use epsilon >= 0, delta in [0, 1].")
    # f(v - j) for j = 0 .. v: the chance of at least so many right answers
    tails = binom.sf(right - 1 - np.arange(right + 1), guesses, expit(epsilon))
    gain = np.max((tails[1:] - tails[0]) / np.arange(1, right + 1)) if right else 0.0
    return float(min(1.0, tails[0] + 2 * canaries * delta * gain))


def epsilon_lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """The smallest epsilon that so many right guesses do not exclude.

    Guarantee: if the run is (epsilon, delta)-differentially private, the result is above epsilon with probability at
    most `1 - confidence`: it could only be if the p-value at epsilon itself were that small.

    Args:
        canaries, guesses, right, delta: as for `p_value`.
        confidence: in (0, 1).

    Edge cases: all right guesses give a finite bound, about log(r / log(1 / (1 - confidence))); no better than a coin
    gives 0.

    Raises:
        ArgumentRefused: as for `p_value`, or a confidence that is no probability.
    """
    if not 0 < confidence < 1:
        raise ArgumentRefused(f"{confidence=} is not a probability between 0 and 1. Use 0.95.")

    def excluded(epsilon: float) -> bool:
        return p_value(canaries, guesses, right, epsilon, delta) <= 1 - confidence

    low = 0.0
    if not excluded(low):
        return low
    while excluded(low + _STEP):
        low += _STEP
        if low >= _LARGEST_EPSILON:
            return low
    high = low + _STEP
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if excluded(middle) else (low, middle)
    return low


def best_guesses(
    scores: np.ndarray, present: np.ndarray, delta: float, confidence: float
) -> tuple[float, int, int, list[tuple[int, int, float]]]:
    """The best lower bound over several numbers of guesses; the confidence pays for having tried them all.

    The auditor names the highest scores as in and as many of the lowest as out, for a few numbers of guesses that are
    fixed beforehand, and each is tested at `1 - (1 - confidence) / tries`.

    Args:
        scores: `[m]`, larger where the example seems to have been in.
        present: `[m]`, whether it was.
        delta, confidence: as for `epsilon_lower_bound`.

    Returns:
        The bound, the number of guesses it comes from and how many were right, and all tries as (guesses, right,
        bound).

    Raises:
        ArgumentRefused: fewer than four scores, or one that is not a number.
    """
    m = len(scores)
    if m < 4 or np.isnan(scores).any():
        raise ArgumentRefused(f"{m} scores, {int(np.isnan(scores).sum())} of them NaN: at least 4 numbers are needed.")
    order = np.argsort(scores, kind="stable")
    sides = sorted({max(2, m // part) for part in (2, 4, 8, 16, 32, 64)})
    tries = []
    for side in sides:  # each side: so many named as out, and as in
        right = int((~present[order[:side]]).sum() + present[order[-side:]].sum())
        bound = epsilon_lower_bound(m, 2 * side, right, delta, 1 - (1 - confidence) / len(sides))
        tries.append((2 * side, right, bound))
    guesses, right, bound = max(tries, key=lambda one: (one[2], one[0]))
    return bound, guesses, right, tries
