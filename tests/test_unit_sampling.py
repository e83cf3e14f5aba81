"""Units are drawn as examples are, by fair and independent coins; of a large one a fair choice takes part."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from hf_dpvision.data.grouping import Units
from hf_dpvision.data.units import NO_ROW
from hf_dpvision.sampling import LogicalBatchIndices, LogicalBatchLoader, PoissonSampler, new_key
from hf_dpvision.unit_sampling import UnitSampler


KEY = bytes(range(32))
# Draws are functions of KEY, so these tests never fail by chance; were the key random, each statistic would exceed
# its threshold with this probability.
FALSE_POSITIVE_RATE = 1e-6
MOST = 3


def units_of(sizes: list[int]) -> Units:
    """Units whose rows lie in a mixed order."""
    order = np.random.default_rng(0).permutation(sum(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    parts = [np.sort(order[start:end]) for start, end in zip(starts, starts[1:], strict=False)]
    return Units(np.concatenate(parts), starts)


def sampler(sizes: list[int], rate: float = 0.3, most: int = MOST, key: bytes = KEY) -> UnitSampler:
    return UnitSampler(PoissonSampler(key, len(sizes), rate), units_of(sizes), key, most)


def drawn(sizes: list[int], steps: int, **options) -> tuple[np.ndarray, list[dict[int, tuple[int, ...]]]]:
    """Whether unit u is in step s, bool `[steps, units]`, and the places of its rows that took part."""
    units, found = units_of(sizes), sampler(sizes, **options)
    owner = {int(row): (unit, place) for unit in range(len(units)) for place, row in enumerate(units.rows_of(unit))}
    included, choices = np.zeros((steps, len(units)), dtype=bool), []
    for step in range(steps):
        choices.append({})
        for rows in found.share(step, 0, 1):
            real = [owner[row] for row in rows if row != NO_ROW]
            (unit,) = {unit for unit, _ in real}  # the rows of one entry are all of one unit
            assert unit not in choices[step] and len(rows) == options.get("most", MOST)
            included[step, unit] = True
            choices[step][unit] = tuple(place for _, place in real)
    return included, choices


SIZES = [1, 2, 3, 5, 7] * 8


def test_every_unit_is_included_at_the_sample_rate_whatever_its_size():
    included, _ = drawn(SIZES, 1000)
    assert stats.binomtest(int(included.sum()), included.size, 0.3).pvalue > FALSE_POSITIVE_RATE
    worst = min(stats.binomtest(int(count), len(included), 0.3).pvalue for count in included.sum(0))
    assert worst > FALSE_POSITIVE_RATE / len(SIZES)


def test_units_are_included_independently_of_one_another_and_of_other_steps():
    included, _ = drawn(SIZES, 1000)
    together = included.T.astype(float) @ included.astype(float)
    pairs = together[np.triu_indices(len(SIZES), 1)]
    worst = min(stats.binomtest(int(count), 1000, 0.09).pvalue for count in (pairs.min(), pairs.max()))
    assert worst > FALSE_POSITIVE_RATE / len(pairs)
    both = int((included[:-1] & included[1:]).sum())
    assert stats.binomtest(both, included[1:].size, 0.09).pvalue > FALSE_POSITIVE_RATE


def test_a_unit_takes_part_with_all_its_rows_or_with_as_many_as_may():
    _, choices = drawn(SIZES, 200)
    for step in choices:
        for unit, places in step.items():
            assert len(set(places)) == min(SIZES[unit], MOST)


def test_every_set_of_rows_of_a_large_unit_is_chosen_equally_often():
    _, choices = drawn([5], 4000, rate=1.0)
    counts = Counter(step[0] for step in choices)
    sets = list(combinations(range(5), MOST))
    assert set(counts) == set(sets)
    assert stats.chisquare([counts[one] for one in sets]).pvalue > FALSE_POSITIVE_RATE


def test_the_choice_is_made_anew_at_each_step_and_independently_of_other_units():
    _, choices = drawn([5, 5], 4000, rate=1.0)
    same = sum(step[0] == step[1] for step in choices)
    again = sum(one[0] == other[0] for one, other in zip(choices, choices[1:], strict=False))
    assert stats.binomtest(same, 4000, 0.1).pvalue > FALSE_POSITIVE_RATE
    assert stats.binomtest(again, 3999, 0.1).pvalue > FALSE_POSITIVE_RATE


def test_the_choice_of_a_unit_does_not_depend_on_the_rows_of_others():
    _, one = drawn([7, 7, 7], 100, rate=1.0)
    _, other = drawn([1, 7, 70], 100, rate=1.0)
    assert [step[1] for step in one] == [step[1] for step in other]
    assert len({step[1] for step in one}) > 20


def test_processes_share_the_draw_of_one():
    whole = sampler(SIZES)
    for step in range(20):
        shares = [sampler(SIZES).share(step, rank, 3) for rank in range(3)]
        together = sorted(np.concatenate(shares).tolist())
        assert together == sorted(whole.share(step, 0, 1))


def test_another_key_makes_other_choices():
    own, other = (sampler([50], rate=1.0, most=10, key=key).share(0, 0, 1) for key in (KEY, new_key()))
    assert own != other  # equal with probability 1e-10


@pytest.mark.parametrize("rate", [1e-9, 1.0])
def test_empty_and_full_draws_have_the_shape_of_all_others(rate):
    share = sampler(SIZES, rate=rate).share(0, 0, 1)
    assert [len(rows) for rows in share] == [MOST] * (len(SIZES) if rate == 1.0 else 0)


def test_the_outer_loader_passes_rows_on():
    indices = LogicalBatchIndices(sampler(SIZES), 4, 0, 1)
    loader = LogicalBatchLoader(indices, len(SIZES))
    assert list(loader) == [sampler(SIZES).share(step, 0, 1) for step in range(4)]
