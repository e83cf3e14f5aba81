"""A realised clipped contribution exceeds the bound by rounding only, over kernels, passes and precisions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import CASES, classification_loss, images, perturbed
from reference import select
from torch import Tensor

from hf_dpvision.audit.rounding import clipping_excess
from hf_dpvision.rules.cost import NormRule


ALLOWED = 1e-4  # relative; below it the change of epsilon is far below the accountant's own interval
BY_NAME = {case.name: case for case in CASES}
MODELS = {name: BY_NAME[name] for name in ("transformers_vit", "vgg")}
WAYS = [(rule, passes) for rule in ("auto", "mixed", "ghost", "instantiate") for passes in (1, 2)]


def wild_examples(size: int) -> Iterator[dict[str, Tensor]]:
    """Single pictures: an ordinary one, a constant one, in which positions add up or cancel, and a glaring one."""
    batch = images(size, torch.float32, n=3)
    batch["pixel_values"][1] = 1.0
    batch["pixel_values"][2] *= 30.0
    for index in range(3):
        yield select(batch, [index])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rule", "passes"), WAYS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_clipped_contribution_exceeds_the_bound_by_less_than_is_allowed(
    name: str, rule: NormRule, passes: int, autocast: torch.dtype | None
) -> None:
    case = MODELS[name]
    model = perturbed(case.build(), torch.float32)
    found = [
        clipping_excess(
            model, classification_loss, example, norm_rule=rule, backward_passes=passes, autocast=autocast
        )
        for example in wild_examples(case.image_size)
    ]
    assert max(found) < ALLOWED
    assert min(found) > -0.01  # and it is not far below: the example was clipped at the bound that was asked for


def test_a_norm_that_is_taken_in_bfloat16_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dpvision.clipping import Flat

    exact = Flat.factors
    monkeypatch.setattr(Flat, "factors", lambda self, squares: exact(self, (squares * 0.994).bfloat16().float()))
    case = MODELS["transformers_vit"]
    model = perturbed(case.build(), torch.float32)
    example = next(wild_examples(case.image_size))
    assert clipping_excess(model, classification_loss, example, norm_rule="auto", backward_passes=1) > ALLOWED
