"""Draws are Bernoulli per example and step, repeatable from the key alone, and cut into microbatches without loss."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from torch.utils.data import DataLoader

from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.sampling import (
    LogicalBatchIndices,
    LogicalBatchLoader,
    MicrobatchStream,
    PoissonSampler,
    microbatches,
    new_key,
)


KEY = bytes(range(32))
# Draws below are functions of KEY, so these tests never fail by chance; were the key random, each statistic would
# exceed its threshold with this probability.
FALSE_POSITIVE_RATE = 1e-6


def inclusions(size: int = 200, rate: float = 0.1, steps: int = 2000) -> np.ndarray:
    """Whether example i is in step s: bool `[steps, size]`."""
    sampler = PoissonSampler(KEY, size, rate)
    found = np.zeros((steps, size), dtype=bool)
    for step in range(steps):
        found[step, sampler.draw(step)] = True
    return found


def test_every_example_is_included_at_the_sample_rate():
    found = inclusions()
    assert stats.binomtest(int(found.sum()), found.size, 0.1).pvalue > FALSE_POSITIVE_RATE
    worst = min(stats.binomtest(int(count), len(found), 0.1).pvalue for count in found.sum(0))
    assert worst > FALSE_POSITIVE_RATE / found.shape[1]


def test_batch_sizes_are_binomial_and_neither_fixed_nor_truncated():
    sizes = inclusions().sum(1)
    ratio = (len(sizes) - 1) * sizes.var(ddof=1) / (200 * 0.1 * 0.9)
    assert 2 * min(stats.chi2.cdf(ratio, len(sizes) - 1), stats.chi2.sf(ratio, len(sizes) - 1)) > FALSE_POSITIVE_RATE
    assert sizes.max() > 32  # 20 expected


@pytest.mark.parametrize("lag", [1, 2, 3, 8])
def test_an_example_is_included_independently_of_other_steps(lag):
    found = inclusions()
    both = int((found[:-lag] & found[lag:]).sum())
    assert stats.binomtest(both, found[lag:].size, 0.01).pvalue > FALSE_POSITIVE_RATE


def test_examples_are_included_independently_of_one_another():
    found = inclusions()
    together = found.T.astype(float) @ found.astype(float)
    pairs = together[np.triu_indices(200, 1)]
    worst = stats.binomtest(int(pairs.max()), len(found), 0.01).pvalue
    assert worst > FALSE_POSITIVE_RATE / len(pairs)


def test_empty_draws_happen_as_often_as_they_should():
    sampler = PoissonSampler(KEY, 5, 0.05)
    empty = sum(len(sampler.draw(step)) == 0 for step in range(2000))
    assert stats.binomtest(empty, 2000, 0.95**5).pvalue > FALSE_POSITIVE_RATE


def test_a_draw_depends_on_key_and_step_only():
    sampler = PoissonSampler(KEY, 1000, 0.1)
    later = sampler.draw(7)
    sampler.draw(3)
    assert np.array_equal(later, sampler.draw(7))
    assert np.array_equal(later, PoissonSampler(KEY, 1000, 0.1).draw(7))
    assert not np.array_equal(later, sampler.draw(8))
    assert not np.array_equal(later, PoissonSampler(new_key(), 1000, 0.1).draw(7))


def test_an_example_keeps_its_membership_when_others_are_appended():
    small, large = PoissonSampler(KEY, 1000, 0.1).draw(4), PoissonSampler(KEY, 3_000_000, 0.1).draw(4)
    assert np.array_equal(small, large[large < 1000])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_are_disjoint_and_together_the_draw(world_size):
    sampler = PoissonSampler(KEY, 100, 0.2)
    for step in range(20):
        shares = [sampler.share(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.sort(np.concatenate(shares)), sampler.draw(step))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("block", [1, 3, 4, 50])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_blocks_make_the_same_microbatches_whatever_the_number_of_processes(world_size, block):
    sampler = PoissonSampler(KEY, 100, 0.2, block)
    for step in range(20):
        alone = microbatches(sampler.share(step, 0, 1), block)
        shares = [microbatches(sampler.share(step, rank, world_size), block) for rank in range(world_size)]
        together = [part for share in shares for part in share]
        assert sorted(together) == alone and sum(alone, []) == sampler.draw(step).tolist()
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1


def test_single_examples_are_dealt_in_turn_by_default():
    sampler = PoissonSampler(KEY, 100, 0.2)
    assert np.array_equal(sampler.share(3, 1, 3), sampler.draw(3)[1::3])


def test_rate_one_includes_everyone():
    assert np.array_equal(PoissonSampler(KEY, 10, 1.0).draw(0), np.arange(10))


def test_small_rates_are_exact_in_64_bits():
    assert PoissonSampler(KEY, 10, 1e-6)._threshold == int(1e-6 * 2**64)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ArgumentRefused, match="sample_rate"):
        PoissonSampler(KEY, 10, rate)


def test_a_short_key_and_an_empty_set_are_refused():
    with pytest.raises(ArgumentRefused, match="key"):
        PoissonSampler(b"short", 10, 0.5)
    with pytest.raises(ArgumentRefused, match="dataset_size"):
        PoissonSampler(KEY, 0, 0.5)


def test_keys_differ():
    assert len({new_key() for _ in range(10)}) == 10


def test_no_step_is_used_twice_over_epochs():
    sampler = PoissonSampler(KEY, 50, 0.3)
    loader = LogicalBatchLoader(LogicalBatchIndices(sampler, 4, 0, 1), 50)
    drawn = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        drawn += list(loader)
    assert drawn == [sampler.draw(step).tolist() for step in range(12)]
    assert len(loader) == 4 and len(loader.dataset) == 50


@pytest.mark.parametrize("size", [1, 4, 100])
def test_microbatches_are_bounded_and_lose_nothing(size):
    indices = list(range(13))
    cuts = microbatches(indices, size)
    assert sum(cuts, []) == indices and max(map(len, cuts)) <= size
    assert microbatches([], size) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_logical_batches_arrive_whole_and_in_order_while_microbatches_are_prefetched(workers):
    logical = [[], [3, 1, 2, 9, 8], [], [], [5], list(range(10)), []]
    asked = []

    def make_loader(batch_sampler):
        asked.append(batch_sampler)
        return DataLoader(range(10), batch_sampler=batch_sampler, num_workers=workers, collate_fn=list)

    stream = MicrobatchStream(make_loader, 2)
    for _ in range(2):  # two epochs, one loader
        source = iter(logical)
        received = []
        while (batch := stream.next_logical_batch(source)) is not None:
            parts = list(batch)
            assert all(len(part) <= 2 for part in parts)
            received.append(sum(parts, []))
        assert received == logical
    assert len(asked) == 1
