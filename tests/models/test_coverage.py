"""Every family of vision models, every parameter trainable: norms and clipped sums equal the slow truth."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import CASES, Case, classification_loss, images, perturbed
from reference import clip_and_sum, mismatch, per_example_gradients

from hf_dpvision import clipped_gradient, clipping, per_example_norms


ALL_WAYS = list(product(("auto", "mixed", "ghost", "instantiate"), (1, 2)))
FEW_WAYS = [("auto", 1), ("ghost", 1), ("mixed", 2)]
CLIPPINGS = [clipping.Flat(5.0), clipping.Automatic()]  # 5.0 lies amid the norms: some examples are clipped


def _failures(
    case: Case, dtype: torch.dtype, ways: list[tuple[str, int]], tolerance: float, own: float | None
) -> list:
    model = perturbed(case.build(), dtype)
    batch = images(case.image_size, dtype)
    truths = {}
    gradients = per_example_gradients(model, classification_loss, batch, repeat=case.repeat)
    for style in CLIPPINGS:
        truths[style] = clip_and_sum(gradients, style)
    failures = []
    for (rule, passes), style in product(ways, CLIPPINGS):
        result = clipped_gradient(
            model, classification_loss, batch, clipping=style, norm_rule=rule, backward_passes=passes
        )
        found = mismatch(result.norms, result.gradients, truths[style], tolerance=tolerance, own=own)
        if found:
            failures.append(f"{rule}, {passes} pass(es), {style}: {found}")
    assert all(parameter.grad is None for parameter in model.parameters())
    return failures


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_parameter_is_clipped_exactly_in_float64(case: Case) -> None:
    failures = _failures(case, torch.float64, ALL_WAYS, tolerance=1e-10, own=1e-7)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_parameter_is_clipped_exactly_in_float32(case: Case) -> None:
    failures = _failures(case, torch.float32, FEW_WAYS, tolerance=1e-4, own=None)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norms_do_not_depend_on_the_other_examples(case: Case) -> None:
    model = perturbed(case.build(), torch.float64)
    batch = images(case.image_size, torch.float64)
    together = per_example_norms(model, classification_loss, batch)
    others = {name: tensor[1:] for name, tensor in batch.items()}
    apart = per_example_norms(model, classification_loss, others)
    torch.testing.assert_close(apart, together[1:], rtol=1e-10, atol=0)


def test_the_table_names_every_model_that_was_promised() -> None:
    promised = (
        "beit beitv2 deit_distilled vit_registers_layer_scale swin swinv2 convnext convnextv2 eva02 xcit maxvit cait "
        "mixer resnet_group_norm resnet_frozen_batch_norm resnetv2_bit resnext vgg efficientnet mobilevit coatnet "
        "davit volo transformers_beit_absolute transformers_beit_relative transformers_beit_shared_relative "
        "transformers_vit transformers_swinv2 transformers_convnext transformers_resnet_frozen_batch_norm"
    )
    assert set(promised.split()) <= {case.name for case in CASES}
