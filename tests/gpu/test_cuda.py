"""On a CUDA device: the same exactness as on the CPU, in float64, float32 and under bfloat16 autocast."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, classification_loss, images, perturbed
from reference import clip_and_sum, mismatch, per_example_gradients, select
from torch import Tensor, nn

from hf_dpvision import clipped_gradient, clipping
from hf_dpvision.noise import NoiseSource, add_noise


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]
FLAT = clipping.Flat(5.0)
EVERY_FAMILY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def on_device(case: Case, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and a batch of the case on the device."""
    batch = {name: value.cuda() for name, value in images(case.image_size, dtype).items()}
    return perturbed(case.build(), dtype).cuda(), batch


@EVERY_FAMILY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_norms_and_sums_equal_the_loop(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    model, batch = on_device(case, dtype)
    truth = clip_and_sum(per_example_gradients(model, classification_loss, batch, repeat=case.repeat), FLAT)
    for rule, passes in (("auto", 1), ("ghost", 1), ("instantiate", 2)):
        result = clipped_gradient(
            model, classification_loss, batch, clipping=FLAT, norm_rule=rule, backward_passes=passes
        )
        found = mismatch(result.norms, result.gradients, truth, tolerance=tolerance, own=None)
        assert not found, f"{rule}, {passes} pass(es): {found}"


@EVERY_FAMILY
@pytest.mark.parametrize("passes", [1, 2])
def test_norms_under_autocast_are_those_of_the_released_gradient(case: Case, passes: int) -> None:
    model, batch = on_device(case, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        single = clipped_gradient(
            model, classification_loss, select(batch, [0]), clipping=clipping.Flat(1e6), backward_passes=passes
        )
    assert all(grad.dtype == torch.float32 for grad in single.gradients.values())
    released = torch.cat([grad.flatten().double() for grad in single.gradients.values()]).norm()
    # some weight gradients are summed in another order each time they are computed
    assert abs(float(single.norms[0]) / float(released) - 1) < 1e-4


def test_noise_is_drawn_on_the_device_with_the_right_size() -> None:
    sums = {"weight": torch.zeros(1000, 1000, device="cuda")}
    noisy = add_noise(sums, 3.0, NoiseSource.from_os_entropy("cuda"))["weight"]
    assert noisy.is_cuda
    assert abs(float(noisy.double().square().mean().sqrt()) / 3.0 - 1) < 5e-3  # 7 standard deviations
