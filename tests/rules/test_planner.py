"""The plan holds no more than its bound, is the fastest within it, and changes no result."""

from __future__ import annotations

import pytest
import torch
from cases import classification_loss, images
from torch import nn

from hf_dpvision import clipped_gradient, clipping
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.rules import planner as planner_file
from hf_dpvision.rules.affine import AffineShape
from hf_dpvision.rules.cost import Choice, NormRule, held, non_private_seconds, seconds
from hf_dpvision.rules.planner import Planner, non_private_peak, private_peak, two_pass_peak
from hf_dpvision.uses import Slot, Theta


SHAPES = [
    AffineShape(3136, 96, 96),
    AffineShape(196, 384, 1152),
    AffineShape(256, 1152, 128, gram_inputs=200.0, held=65536),
    AffineShape(1, 512, 10),
]
N = 64


def slots() -> list[Slot]:
    thetas = [Theta(torch.empty(shape.weight_elements), frozenset(), True) for shape in SHAPES]
    return [Slot(theta, "linear", shape, None) for theta, shape in zip(thetas, SHAPES, strict=True)]


@pytest.mark.parametrize("mebibytes", [1, 90, 150, 200, 250, 400, 10_000])
def test_one_pass_stays_within_the_bound_and_otherwise_the_leaner_of_one_and_two_is_taken(mebibytes: int) -> None:
    uses, saved = slots(), mebibytes * 2**20
    plan = Planner(memory_bound=1.0).plan(uses, N, NormRule.AUTO, 1, saved)
    least = {s: min(Choice, key=lambda c, shape=s.shape: (held(c, shape), c is not Choice.KEEP)) for s in uses}
    leanest, bound = private_peak(uses, least, N, saved), max(2**26, non_private_peak(uses, N, saved))
    one_pass = leanest <= max(bound, two_pass_peak(uses, N, saved))
    assert plan.backward_passes == (1 if one_pass else 2)
    if one_pass:
        assert private_peak(uses, plan.choices, N, saved) <= max(bound, leanest)
    else:
        assert Choice.KEEP not in plan.choices.values()


def test_without_need_the_fastest_is_chosen() -> None:
    plan = Planner(memory_bound=1.0).plan(slots(), N, NormRule.AUTO, 1, 2**40)
    for slot, choice in plan.choices.items():
        assert seconds(choice, slot.shape) == min(seconds(c, slot.shape) for c in Choice)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1, stride=2), nn.Flatten(),
        nn.Linear(128, 5),
    ).double()  # fmt: skip


@pytest.mark.parametrize("bound", [1e-9, 1.05, 1e9])
@pytest.mark.parametrize("measure", [False, True])
def test_bound_and_measurement_change_no_result(
    bound: float, measure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_file, "_SMALL", 0)
    monkeypatch.setattr(planner_file, "_WORTH_TIMING", 0)
    batch, style = images(8, torch.float64), clipping.Flat(0.1)
    expected = clipped_gradient(net(), classification_loss, batch, clipping=style, norm_rule="instantiate")
    planner = Planner(bound, measure)
    for _ in range(2):  # the second time with what was measured in the first
        result = clipped_gradient(net(), classification_loss, batch, clipping=style, planner=planner)
        torch.testing.assert_close(result.norms, expected.norms, rtol=1e-10, atol=0)
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_that_is_no_ratio_is_refused(bound: float) -> None:
    with pytest.raises(ArgumentRefused, match="memory_bound"):
        clipped_gradient(
            net(), classification_loss, images(8, torch.float64), clipping=clipping.Flat(1.0), memory_bound=bound
        )


def kept_gradients(inputs: int, outputs: int, uses: int) -> list[Slot]:
    """Uses whose gradients are larger than what they come from, with nothing else to hold."""
    shape = AffineShape(96, inputs, outputs)
    thetas = [Theta(torch.empty(outputs, inputs), frozenset((str(i),)), True) for i in range(uses)]
    return [Slot(theta, "linear", shape, None) for theta in thetas]


def peak_over_plain(plan: planner_file.Plan, uses: list[Slot], saved: int) -> float:
    return private_peak(uses, plan.choices, N, saved) / non_private_peak(uses, N, saved)


def test_memory_is_not_spent_where_it_buys_hardly_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    uses, saved = kept_gradients(512, 512, 12), 200 * 2**20
    dear = Planner(memory_bound=10.0).plan(uses, N, NormRule.AUTO, 1, saved)
    monkeypatch.setattr(planner_file, "_TIME_FOR_MEMORY", 0.0)
    free = Planner(memory_bound=10.0).plan(uses, N, NormRule.AUTO, 1, saved)
    assert set(free.choices.values()) == {Choice.KEEP}
    whole = sum(non_private_seconds(slot.shape.flops) for slot in uses)
    extra = [sum(seconds(choice, slot.shape) for slot, choice in plan.choices.items()) for plan in (dear, free)]
    slower = (extra[0] - extra[1]) / whole
    lower = peak_over_plain(free, uses, saved) - peak_over_plain(dear, uses, saved)
    assert lower > 0.5 and 0 <= slower <= 0.25 * lower


def test_no_time_is_spent_where_the_peak_does_not_fall() -> None:
    """What is held is far less than what was saved: it is held when that is released, and the peak is at the start."""
    uses, saved = kept_gradients(512, 512, 12), 4 * 2**30
    plan = Planner(memory_bound=10.0).plan(uses, N, NormRule.AUTO, 1, saved)
    assert set(plan.choices.values()) == {Choice.KEEP}


def test_the_same_sizes_give_the_same_plan() -> None:
    plans = [Planner().plan(slots(), N, NormRule.AUTO, 1, 200 * 2**20) for _ in range(2)]
    assert [list(plan.choices.values()) for plan in plans][0] == list(plans[1].choices.values())
