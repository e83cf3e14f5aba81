"""With full_determinism sums are exact: the same bits in every order and grouping, and near the truth."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes_worker import MODELS
from torch import Tensor
from trainer_cases import Linear, trainer, weights

from hf_dpvision.accounting import Ledger
from hf_dpvision.clipping import Flat
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.exact_sums import Grid
from hf_dpvision.mechanism import PrivateMechanism
from hf_dpvision.rules.cost import NormRule


def clipped(count: int, entries: int, bound: float, seed: int) -> Tensor:
    """Gradients `[count, entries]`, float32, of norms between about 1e-12 and 1 times the bound."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, entries, generator=generator)
    lengths = bound * 10.0 ** (-12 * torch.rand(count, 1, generator=generator))
    return values / values.norm(dim=1, keepdim=True) * lengths


def rounded(grid: Grid, value: Tensor) -> Tensor:
    return grid.rounded({"weight": value})["weight"]


def in_groups(values: Tensor, groups: int, seed: int) -> Tensor:
    """The sum of shuffled rows: first within groups, as processes form theirs, then over the groups."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    total = torch.zeros_like(values[0])
    for group in values[order].tensor_split(groups):
        part = torch.zeros_like(total)
        for value in group:
            part += value
        total += part
    return total


@given(
    st.integers(1, 60), st.floats(-12, 12).map(math.exp), st.integers(1, 10**7), st.integers(1, 5),
    st.integers(0, 10**6),
)  # fmt: skip
def test_exact_sums_have_the_same_bits_in_every_order_and_grouping(count, bound, more, groups, seed):
    grid = Grid(count + more, bound, 7)
    exact = rounded(grid, clipped(count, 7, bound, seed))
    truth = [float(sum(map(Fraction, column))) for column in exact.T.tolist()]
    for shuffle in (seed, seed + 1):
        assert in_groups(exact, groups, shuffle).tolist() == truth


def test_plain_sums_do_depend_on_the_order():
    values = clipped(60, 1000, 1.0, 0)
    for dtype in (torch.float32, torch.float64):
        first, second = in_groups(values.to(dtype), 1, 0), in_groups(values.to(dtype), 2, 1)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("examples", [1, 3, 1_000_000])
def test_the_sum_of_all_examples_at_the_clip_norm_is_exact(examples):
    for bound in (1.0, 0.3, 7e-5, 1e4):
        grid = Grid(examples, bound, 1)
        one = rounded(grid, torch.tensor([bound]))
        for count in (examples, -examples):
            total = one.item() * count  # what so many additions would come to
            assert Fraction(total) == Fraction(one.item()) * count
            # and with the headroom for rounding every neighbour of it is a number as well
            assert Fraction(2 * total + grid.spacing) == 2 * Fraction(total) + Fraction(grid.spacing)


@given(st.integers(1, 40), st.floats(-12, 12).map(math.exp), st.integers(0, 10**6))
def test_exact_sums_are_within_the_stated_bound_of_the_truth(count, bound, seed):
    examples = 1_000_000
    grid, values = Grid(examples, bound, 5), clipped(count, 5, bound, seed)
    assert grid.spacing / 2 <= examples * bound * 2**-52
    total = in_groups(rounded(grid, values), 3, seed)
    for found, column in zip(total.tolist(), values.T.tolist(), strict=True):
        assert abs(Fraction(found) - sum(map(Fraction, column))) <= count * Fraction(grid.spacing) / 2


def test_rounding_lengthens_what_one_example_contributes_by_no_more_than_stated():
    entries, longest = 10_000, 0.0
    grid = Grid(1_000_000, 1.0, entries)
    for seed in range(20):
        without, one = (clipped(1, entries, 1.0, 2 * seed + i)[0].double() for i in (0, 1))
        moved = rounded(grid, without + one) - rounded(grid, without)
        longest = max(longest, float(moved.norm() - one.norm()))
        assert float((moved - one).norm()) <= math.sqrt(entries) * grid.spacing
    assert longest <= math.sqrt(entries) * grid.spacing < 2.4e-8


def test_rounding_takes_over_what_it_is_given_and_leaves_the_tensors_themselves():
    value = torch.tensor([1 / 3], dtype=torch.float64)
    gradients = {"weight": value, "bias": torch.tensor([0.5])}
    found = Grid(10**6, 1.0, 2).rounded(gradients)
    assert not gradients and value.item() == 1 / 3 != found["weight"].item() == pytest.approx(1 / 3, abs=1.2e-10)
    assert found["bias"].item() == 0.5 and {tensor.dtype for tensor in found.values()} == {torch.float64}


def test_a_grid_too_coarse_for_the_guarantee_is_refused():
    assert Grid(10**6, 1.0, 10**9).spacing == 2.0**-32
    with pytest.raises(ArgumentRefused, match="full_determinism=True.*up to 1000000000 examples.*over 1000000000"):
        Grid(10**9, 1.0, 10**9)
    for bound in (1e-300, 1e300):
        with pytest.raises(ArgumentRefused, match="per_sample_max_grad_norm=1e.*nearer to 1"):
            Grid(10, bound, 10)


@pytest.mark.parametrize("backward_passes", [1, 2])
@pytest.mark.parametrize("family", MODELS)
def test_a_run_with_exact_sums_is_checked_and_equals_a_plain_one_up_to_rounding(tmp_path, family, backward_passes):
    settings = {"backward_passes": backward_passes, "per_device_train_batch_size": 3, "self_check": True}
    plain = trainer(tmp_path / "plain", MODELS[family](), **settings)
    plain.train()
    exact = trainer(tmp_path / "exact", MODELS[family](), full_determinism=True, **settings)
    exact.train()
    assert torch.are_deterministic_algorithms_enabled()
    assert {p.grad.dtype for p in exact.model.parameters() if p.grad is not None} <= {torch.float32}
    assert (weights(plain.model) - weights(exact.model)).abs().max() < 1e-6
    assert (weights(exact.model) - weights(MODELS[family]())).abs().max() > 1e-3
    assert exact.epsilon() == plain.epsilon()


def test_a_grid_that_is_too_coarse_is_refused_with_nothing_charged(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dpvision.exact_sums._TOLERATED", 1e-16)
    run = trainer(tmp_path, Linear(), full_determinism=True)
    with pytest.raises(ArgumentRefused, match="one example could contribute .* over 2307 parameters"):
        run.train()
    assert run.epsilon().upper == 0 and not list(Path(tmp_path).iterdir())


def test_without_privacy_there_is_no_grid_and_training_works(tmp_path):
    run = trainer(tmp_path, Linear(), full_determinism=True, disable_dp=True, noise_multiplier=None)
    run.train()
    assert run.state.global_step == 4 and not run.args.sums_exactly


def test_every_microbatch_but_the_last_of_a_draw_is_full(tmp_path):
    sizes = []

    def collate(examples: list[dict]) -> dict[str, Tensor]:
        sizes.append(len(examples))
        pixels = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}

    run = trainer(
        tmp_path, Linear(), data_collator=collate, full_determinism=True,
        per_device_train_batch_size=6, augmentation_multiplicity=2, logical_batch_size=32, max_steps=2,
    )  # fmt: skip
    run.train()
    assert sizes[1:].count(6) > 6  # three examples, two views of each


@pytest.mark.parametrize("repeatable", [False, True])
def test_kernels_are_timed_on_accelerators_only_where_runs_need_not_repeat(monkeypatch, repeatable):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    mechanism = PrivateMechanism(
        clipping=Flat(1.0), norm_rule=NormRule.AUTO, backward_passes=1, rows=1, repeatable=repeatable,
        noise_multiplier=1.0, sample_rate=0.1, planned_steps=1, ledger=Ledger(), journal=None, noise=lambda step: None,
    )  # fmt: skip
    assert mechanism._planner.measure is not repeatable
