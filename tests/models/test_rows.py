"""Several rows of a batch make one example (views of an image, images of a person), every family: exact as well."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, classification_loss, images, perturbed
from reference import clip_and_sum, mismatch, select
from torch import Tensor, nn

from hf_dpvision import clipped_gradient, clipping, per_example_norms
from hf_dpvision.errors import DataRefused


ROWS = 2
FLAT = clipping.Flat(5.0)
WEIGHTS = torch.tensor([0.75, 0.25], dtype=torch.float64)  # 0 for a row that only fills up


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One loss per example: a weighted mean over its rows."""
    return (classification_loss(model, batch).view(-1, ROWS) * WEIGHTS).sum(1)


def loop(model: nn.Module, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Gradients by ordinary autograd, one example after the other, each twice in one batch and halved."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for start in range(0, len(batch["labels"]), ROWS):
        own = list(range(start, start + ROWS))
        value = loss(model, select(batch, own + own)).mean()
        grads = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
        pairs = zip(trainable.items(), grads, strict=True)
        found.append({name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs})
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_example_of_several_rows_is_clipped_as_one(case: Case) -> None:
    model = perturbed(case.build(), torch.float64)
    batch = images(case.image_size, torch.float64, n=3 * ROWS)
    truth = clip_and_sum(loop(model, batch), FLAT)
    for rule, passes in (("auto", 1), ("ghost", 2)):
        result = clipped_gradient(
            model, loss, batch, clipping=FLAT, norm_rule=rule, backward_passes=passes, rows=ROWS
        )
        found = mismatch(result.norms, result.gradients, truth, tolerance=1e-10, own=1e-7)
        assert not found, f"{rule}, {passes} pass(es): {found}"


def linear_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().sum(1).view(-1, ROWS).sum(1)


def test_norms_alone_are_the_same() -> None:
    model, batch = nn.Linear(4, 2), {"x": torch.randn(6, 4)}
    expected = clipped_gradient(model, linear_loss, batch, clipping=FLAT, rows=ROWS).norms
    assert torch.equal(per_example_norms(model, linear_loss, batch, rows=ROWS), expected)


def test_an_example_that_lacks_rows_is_refused() -> None:
    with pytest.raises(DataRefused, match="5 rows, and rows=2.*weight zero"):
        clipped_gradient(nn.Linear(4, 2), linear_loss, {"x": torch.randn(5, 4)}, clipping=FLAT, rows=ROWS)


def test_losses_per_row_are_refused() -> None:
    with pytest.raises(DataRefused, match=r"returned \(6,\) for a batch of 3 examples"):
        clipped_gradient(
            nn.Linear(4, 2), lambda m, b: m(b["x"]).sum(1), {"x": torch.randn(6, 4)}, clipping=FLAT, rows=ROWS
        )
