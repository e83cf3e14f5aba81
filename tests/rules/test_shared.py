"""Projections that read one activation form its Gram matrix once, and every norm is that of the loop."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import CASES, Case, classification_loss, images, perturbed
from reference import clip_and_sum, mismatch, per_example_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hf_dpvision import clipped_gradient, clipping
from hf_dpvision.capture import capture
from hf_dpvision.rules import rule_for, shared
from hf_dpvision.rules.affine import Affine, AffineShape
from hf_dpvision.rules.shared import same_activation, shapes


SEPARATE = [case for case in CASES if case.name in {"transformers_vit", "transformers_beit_all", "eva02_separate_qkv"}]
WAYS = list(product(("auto", "mixed", "ghost", "instantiate"), (1, 2)))
STYLE = clipping.Flat(5.0)


def groups(model: nn.Module, batch: dict[str, Tensor]) -> list[list]:
    """Uses that share an activation."""
    with capture(model, batch, 3, rule_for) as forward:
        classification_loss(model, batch)
    return [members for members in same_activation(forward.uses.slots) if len(members) > 1]


def operations(model: nn.Module, batch: dict[str, Tensor], rule: str, passes: int) -> int:
    with FlopCounterMode(display=False) as counter:
        clipped_gradient(
            model, classification_loss, batch, clipping=STYLE, norm_rule=rule, backward_passes=passes
        )
    return counter.get_total_flops()


@pytest.mark.parametrize("case", SEPARATE, ids=lambda case: case.name)
def test_projections_to_queries_keys_and_values_are_found_together(case: Case) -> None:
    found = groups(perturbed(case.build(), torch.float64), images(case.image_size, torch.float64))
    found = [{name.split(".")[-2] for slot in members for name in slot.theta.sources} for members in found]
    gated = {"fc1_g", "fc1_x"}  # in the gated perceptron of EVA-02
    assert [len(names) for names in found if names != gated] == [3, 3]  # two blocks
    assert (gated in found) == (case.name == "eva02_separate_qkv")


@pytest.mark.parametrize("case", SEPARATE, ids=lambda case: case.name)
def test_norms_and_sums_equal_the_loop_and_the_gram_matrix_is_formed_once(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = perturbed(case.build(), torch.float64), images(case.image_size, torch.float64)
    truth = clip_and_sum(per_example_gradients(model, classification_loss, batch), STYLE)
    for rule, passes in WAYS:
        result = clipped_gradient(
            model, classification_loss, batch, clipping=STYLE, norm_rule=rule, backward_passes=passes
        )
        found = mismatch(result.norms, result.gradients, truth, tolerance=1e-10, own=1e-7)
        assert not found, f"{rule}, {passes} pass(es): {found}"
    # of each group all Gram matrices of the activation but one, each 2 t^2 d operations per example
    shared_uses = [(len(members) - 1, members[0].shape) for members in groups(model, batch)]
    saved = sum(less * 2 * shape.positions**2 * shape.inputs for less, shape in shared_uses) * len(batch["labels"])
    together = [operations(model, batch, "ghost", passes) for passes in (1, 2)]
    monkeypatch.setattr(shared, "same_activation", lambda slots: ([slot] for slot in slots if slot.shape is not None))
    apart = [operations(model, batch, "ghost", passes) for passes in (1, 2)]
    assert [a - t for a, t in zip(apart, together, strict=True)] == [saved, saved]


class Projections(nn.Module):
    """Three projections of one activation; what happens to it and to them in between is `change`."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change, self.first = change, nn.Linear(4, 4)
        self.q, self.k, self.v = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.change == "other values":
            return F.scaled_dot_product_attention(self.q(x), self.k(x * 1.5), self.v(x))
        if self.change == "written in between":
            y = x.clone()
            with torch.no_grad():
                q = self.q(y)
            y += 1
            return F.scaled_dot_product_attention(q + self.q(y), self.k(y), self.v(y))
        if self.change == "one without effect":
            return F.scaled_dot_product_attention(self.q(x), x[..., :1].expand(-1, -1, 5), self.v(x)) + 0 * _lost(
                self.k(x)
            )
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


def _lost(x: Tensor) -> Tensor:
    return x.detach().sum()


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).sin().sum((1, 2))


@pytest.mark.parametrize("change", ["none", "other values", "written in between", "one without effect"])
@pytest.mark.parametrize("frozen", [None, "k.weight"])
def test_what_only_looks_shared_is_not(change: str, frozen: str | None) -> None:
    torch.manual_seed(0)
    model = Projections(change).double()
    if frozen:
        model.get_parameter(frozen).requires_grad_(False)
    batch = {"x": torch.randn(3, 6, 4, dtype=torch.float64)}
    truth = clip_and_sum(per_example_gradients(model, losses, batch), clipping.Flat(0.5))
    for rule, passes in WAYS:
        result = clipped_gradient(
            model, losses, batch, clipping=clipping.Flat(0.5), norm_rule=rule, backward_passes=passes
        )
        found = mismatch(result.norms, result.gradients, truth, tolerance=1e-10, own=1e-7)
        assert not found, f"{rule}, {passes} pass(es): {found}"


@pytest.mark.parametrize("positions", [1, 7, 150])
def test_the_norms_of_each_use_are_those_it_has_alone(positions: int) -> None:
    columns = torch.randn(5, positions, 6)
    parts = [Affine(torch.randn(5, positions, width), columns) for width in (3, 4, 8)]
    for part, norms in zip(parts, Affine.shared_ghost_squared_norms(parts), strict=True):
        torch.testing.assert_close(norms, part.ghost_squared_norms(), rtol=1e-6, atol=0)


def test_the_cost_model_counts_a_shared_gram_matrix_once() -> None:
    case = SEPARATE[-1]
    found = groups(perturbed(case.build(), torch.float64), images(case.image_size, torch.float64))[0]
    sizes = shapes(found)
    total = sum(sizes[slot].gram_flops for slot in found)
    plain: AffineShape = found[0].shape
    gram = 2 * plain.positions**2
    true = gram * (plain.inputs + sum(slot.shape.outputs for slot in found))
    assert true - len(found) < total <= true  # whole numbers of operations per use
