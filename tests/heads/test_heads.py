"""Heads with one release: exact without noise, bounded and accounted as stated, and never swayed by a broken row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_dpvision import accounting, per_example_norms
from hf_dpvision.accounting import Ledger
from hf_dpvision.errors import ArgumentRefused, DataRefused
from hf_dpvision.heads import (
    LinearProbe,
    Moments,
    class_sums,
    least_squares_head,
    moments,
    prototype_head,
    released_class_sums,
    released_moments,
    ridge_above_noise,
)
from hf_dpvision.heads.prototypes import CLIPPING
from hf_dpvision.noise import NoiseSource


N, D, K = 60, 7, 4
WEIGHTS = (0.25, 1.0, 3.0)


def data(seed: int = 0, count: int = N) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, D)) * generator.lognormal(sigma=2, size=(count, 1))
    return features.astype(np.float32), generator.integers(K, size=count)


def as_vector(sums: Moments) -> torch.Tensor:
    """The released vector, built by another way: all entries of the whole matrix have the Frobenius norm."""
    return torch.cat([sums.gram.flatten(), sums.weight * sums.cross.flatten()])


def test_moments_equal_their_definition():
    features, labels = data()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    sums = moments(features, labels, K)
    gram = sum(np.outer(u, u) for u in unit)
    cross = sum(np.outer(u, np.eye(K)[y]) for u, y in zip(unit, labels, strict=True))
    np.testing.assert_allclose(sums.gram, gram, atol=1e-5)
    np.testing.assert_allclose(sums.cross, cross, atol=1e-5)


def test_least_squares_without_noise_is_the_minimum_of_its_loss():
    features, labels = data()
    unit = torch.from_numpy(features).double()
    unit = unit / unit.norm(dim=1, keepdim=True)
    weight = least_squares_head(moments(features, labels, K), ridge=0.3).double().requires_grad_()
    loss = (unit @ weight.T - F.one_hot(torch.from_numpy(labels), K)).square().sum() + 0.3 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize("weight", WEIGHTS)
def test_no_neighbour_moves_the_moments_by_more_than_the_bound_and_every_unit_row_attains_it(weight):
    features, labels = data()
    whole = moments(features, labels, K, weight)
    bound = whole.clipping.sensitivity()
    assert bound == pytest.approx(math.sqrt(1 + weight**2))
    for out in range(N):
        without = moments(np.delete(features, out, 0), np.delete(labels, out), K, weight)
        moved = (as_vector(whole) - as_vector(without)).norm().item()
        assert moved == pytest.approx(bound, rel=1e-9)
        zeroed = features.copy()
        zeroed[out] = 0
        assert torch.allclose(as_vector(moments(zeroed, labels, K, weight)), as_vector(without), atol=1e-12)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_vector_that_gets_the_noise_has_the_norm_of_the_contribution(weight):
    """Noise of a known size on one example's sums: off the diagonal it is smaller by sqrt(2), on `cross` by w."""
    exact = moments(*data(count=1), K, weight)
    sigma, draws = 2.0, 400
    noisy = [released_moments(exact, sigma, Ledger(), NoiseSource.for_tests(seed)) for seed in range(draws)]
    grams = torch.stack([each.gram - exact.gram for each in noisy])
    crosses = torch.stack([each.cross - exact.cross for each in noisy])
    std = sigma * exact.clipping.sensitivity()
    off = ~torch.eye(D, dtype=torch.bool)
    assert torch.equal(grams, grams.transpose(1, 2))
    assert grams[:, ~off].std().item() == pytest.approx(std, rel=0.05)
    assert grams[:, off].std().item() == pytest.approx(std / math.sqrt(2), rel=0.05)
    assert crosses.std().item() == pytest.approx(std / weight, rel=0.05)
    assert noisy[0].noise_std == std


def test_the_ridge_lies_above_the_eigenvalues_of_the_noise_and_hardly_so():
    width = 200
    nothing = Moments(torch.zeros(width, width).double(), torch.zeros(width, K).double())
    noisy = released_moments(nothing, 3.0, Ledger(), NoiseSource.for_tests(0))
    largest = torch.linalg.eigvalsh(noisy.gram).abs().max().item()
    assert largest < 1.05 * ridge_above_noise(noisy)
    assert largest > 0.85 * ridge_above_noise(noisy)
    assert ridge_above_noise(nothing) == 1.0


def test_negative_eigenvalues_of_noise_cannot_blow_the_head_up():
    noisy = released_moments(moments(*data(), K), 50.0, Ledger(), NoiseSource.for_tests(0))
    assert torch.linalg.eigvalsh(noisy.gram).min() < -100
    assert least_squares_head(noisy, ridge=10.0).double().norm() <= noisy.cross.norm() / 10.0 * (1 + 1e-6)


def test_class_sums_equal_their_definition_and_prototypes_are_their_directions():
    features, labels = data()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = np.stack([unit[labels == k].mean(0) for k in range(K)])
    sums = class_sums(features, labels, K)
    np.testing.assert_allclose(sums, np.stack([unit[labels == k].sum(0) for k in range(K)]), atol=1e-5)
    directions = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(prototype_head(sums), directions, atol=1e-5)


def test_no_neighbour_moves_the_class_sums_by_more_than_one_and_every_unit_row_attains_it():
    features, labels = data()
    whole = class_sums(features, labels, K)
    assert CLIPPING.sensitivity() == 1.0
    for out in range(N):
        without = class_sums(np.delete(features, out, 0), np.delete(labels, out), K)
        assert (whole - without).norm().item() == pytest.approx(1.0, rel=1e-9)


def test_noise_on_class_sums_has_the_stated_size():
    features, labels = data()
    exact = class_sums(features, labels, K)
    noisy = [released_class_sums(exact, 2.5, Ledger(), NoiseSource.for_tests(seed)) - exact for seed in range(300)]
    assert torch.stack(noisy).std().item() == pytest.approx(2.5, rel=0.05)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0])
def test_epsilon_of_a_release_is_that_of_one_unsampled_gaussian(epsilon):
    sigma = accounting.noise_multiplier(target_epsilon=epsilon, delta=1e-5, sample_rate=1.0, steps=1)
    features, labels = data()
    for release in (
        lambda ledger: released_class_sums(class_sums(features, labels, K), sigma, ledger, NoiseSource.for_tests(0)),
        lambda ledger: released_moments(moments(features, labels, K), sigma, ledger, NoiseSource.for_tests(0)),
    ):
        ledger = Ledger()
        release(ledger)
        bounds = ledger.epsilon(1e-5)
        assert [(e.sample_rate, e.noise_multiplier, e.steps) for e in ledger.events] == [(1.0, sigma, 1)]
        assert bounds.accountant == "gaussian"
        assert 0.999 * epsilon < bounds.upper <= epsilon


def test_the_ledger_is_charged_before_the_noise_is_drawn():
    class Broken(NoiseSource):
        def normal(self, shape, std):
            raise RuntimeError("no entropy")

    ledger = Ledger()
    with pytest.raises(RuntimeError, match="no entropy"):
        released_class_sums(class_sums(*data(), K), 1.0, ledger, Broken(torch.Generator()))
    assert ledger.steps == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_row_that_is_broken_contributes_exactly_zero(value):
    features, labels = data()
    broken = features.copy()
    broken[5] = value
    without = np.delete(features, 5, 0), np.delete(labels, 5)
    assert torch.allclose(class_sums(broken, labels, K), class_sums(*without, K), atol=1e-12)
    assert torch.allclose(as_vector(moments(broken, labels, K)), as_vector(moments(*without, K)), atol=1e-12)


def test_sums_over_many_parts_are_those_over_one(monkeypatch):
    from hf_dpvision.heads import releases

    features, labels = data()
    whole = as_vector(moments(features, labels, K)), class_sums(features, labels, K)
    monkeypatch.setattr(releases, "_AT_ONCE", 7)
    assert torch.allclose(as_vector(moments(features, labels, K)), whole[0], atol=1e-12)
    assert torch.allclose(class_sums(features, labels, K), whole[1], atol=1e-12)


def test_labels_that_do_not_fit_are_refused_and_nothing_is_charged():
    features, labels = data()
    with pytest.raises(DataRefused, match="outside of the 3 classes"):
        class_sums(features, labels, 3)
    with pytest.raises(DataRefused, match="one label"):
        moments(features, labels[:-1], K)
    with pytest.raises(ArgumentRefused, match="weight=0"):
        moments(features, labels, K, weight=0)
    with pytest.raises(ArgumentRefused, match="ridge=0"):
        least_squares_head(moments(features, labels, K), ridge=0)


def test_norms_of_the_probe_have_the_closed_form():
    features, labels = data()
    probe = LinearProbe(D, K)
    torch.nn.init.normal_(probe.weight)
    batch = {"features": torch.from_numpy(features), "labels": torch.from_numpy(labels)}

    def loss(model, batch):
        return F.cross_entropy(model(batch["features"]), batch["labels"], reduction="none")

    probabilities = probe(batch["features"]).softmax(-1)
    closed_form = (probabilities - F.one_hot(batch["labels"], K)).norm(dim=1)
    norms = per_example_norms(probe, loss, batch)
    assert torch.allclose(norms, closed_form, rtol=1e-4)
    assert norms.max() < math.sqrt(2)
