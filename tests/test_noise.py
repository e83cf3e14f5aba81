"""Noise is Gaussian of the stated size, private, fresh, and drawn once per parameter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from scipy import stats

from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.noise import NoiseSource, add_noise


# The seeds are fixed, so these tests never fail by chance; with other seeds each would, with this probability.
FALSE_POSITIVE_RATE = 1e-6


@pytest.mark.parametrize("std", [0.01, 1.0, 300.0])
def test_noise_has_the_stated_standard_deviation(std):
    draws = NoiseSource.for_tests(1).normal((200_000,), std).double()
    statistic = float((draws / std).square().sum())
    p = 2 * min(stats.chi2.cdf(statistic, 200_000), stats.chi2.sf(statistic, 200_000))
    assert p > FALSE_POSITIVE_RATE
    assert abs(float(draws.mean())) < 4.9 * std / 200_000**0.5


def test_noise_two_percent_too_small_would_be_seen():
    draws = NoiseSource.for_tests(1).normal((200_000,), 0.98).double()
    assert stats.chi2.cdf(float(draws.square().sum()), 200_000) < FALSE_POSITIVE_RATE


def test_noise_is_gaussian():
    draws = NoiseSource.for_tests(2).normal((50_000,), 2.0).numpy()
    assert stats.kstest(draws, "norm", args=(0, 2.0)).pvalue > FALSE_POSITIVE_RATE


def test_parameters_and_steps_get_different_noise():
    source = NoiseSource.for_tests(3)
    sums = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    draws = [value for _ in range(3) for value in add_noise(sums, 1.0, source).values()]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(6)
    assert correlations.abs().max() < 0.2  # 6.3 standard deviations


def test_noise_is_added_to_every_entry_and_shapes_are_kept():
    sums = {"scalar": torch.tensor(5.0), "matrix": torch.ones(3, 4), "double": torch.ones(2, dtype=torch.float64)}
    noisy = add_noise(sums, 1e-3, NoiseSource.for_tests(0))
    for name, value in sums.items():
        assert noisy[name].shape == value.shape and noisy[name].dtype == value.dtype
        assert ((noisy[name] - value) != 0).all() and torch.allclose(noisy[name], value, atol=0.01)


def test_os_entropy_gives_different_noise_whatever_the_global_seed():
    draws = []
    for _ in range(2):
        torch.manual_seed(42)
        draws.append(NoiseSource.from_os_entropy().normal((10,), 1.0))
    assert not torch.equal(*draws)


def test_the_global_generator_is_neither_read_nor_advanced():
    before = torch.get_rng_state()
    NoiseSource.from_os_entropy().normal((10,), 1.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("save", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_source_cannot_be_saved_or_copied(save):
    with pytest.raises(TypeError, match="repeats its noise"):
        save(NoiseSource.for_tests(0))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_noise_without_a_size_is_refused(std):
    with pytest.raises(ArgumentRefused, match="std"):
        add_noise({"a": torch.zeros(2)}, std, NoiseSource.for_tests(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_are_refused(dtype):
    with pytest.raises(ArgumentRefused, match="half precision"):
        add_noise({"a": torch.zeros(2, dtype=dtype)}, 1.0, NoiseSource.for_tests(0))
