"""No clip factor lets an example contribute more than the stated sensitivity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dpvision.clipping import Automatic, Flat
from hf_dpvision.errors import ArgumentRefused


norms = st.one_of(st.just(0.0), st.floats(1e-30, 1e18))
bounds = st.floats(1e-6, 1e6)


@given(norm=norms, bound=bounds, gamma=st.sampled_from([0.0, 0.01, 1.0]))
def test_contribution_is_at_most_the_sensitivity(norm, bound, gamma):
    for style in (Flat(bound), Automatic(bound, gamma)):
        factor = style.factors(torch.tensor([norm], dtype=torch.float64).square())
        assert 0 <= float(factor) * norm <= style.sensitivity() * (1 + 1e-9)


@pytest.mark.parametrize("style", [Flat(1.0), Automatic(), Automatic(1.0, 0.0)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_norm_gives_factor_zero(style, poison):
    assert style.factors(torch.tensor([poison, 4.0]))[0] == 0


def test_flat_leaves_short_gradients_alone_and_automatic_normalises():
    squared = torch.tensor([0.25, 4.0], dtype=torch.float64)
    assert torch.allclose(Flat(1.0).factors(squared), torch.tensor([1.0, 0.5], dtype=torch.float64))
    expected = torch.tensor([1 / 0.51, 1 / 2.01], dtype=torch.float64)
    assert torch.allclose(Automatic().factors(squared), expected)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("style", [Flat, Automatic])
def test_bound_that_bounds_nothing_is_refused(style, bound):
    with pytest.raises(ArgumentRefused, match="max_norm"):
        style(bound)


@pytest.mark.parametrize("gamma", [-0.1, float("nan")])
def test_gamma_that_lets_gradients_grow_is_refused(gamma):
    with pytest.raises(ArgumentRefused, match="gamma"):
        Automatic(1.0, gamma)
