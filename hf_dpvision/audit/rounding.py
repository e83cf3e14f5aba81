"""By how much rounding lets one clipped contribution exceed its bound."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..clipping import Flat
from ..dpsgd import PerExampleLoss, clipped_gradient
from ..rules.cost import NormRule


def clipping_excess(
    model: nn.Module,
    per_example_loss: PerExampleLoss,
    example: Mapping[str, Tensor],
    *,
    norm_rule: NormRule | str,
    backward_passes: int,
    autocast: torch.dtype | None = None,
    shares: tuple[float, ...] = (0.9, 0.01),
) -> float:
    """The largest relative excess over C of what one example really contributes to the clipped sum.

    The contribution is measured in float64, as it is released, with bounds C that are a share of the gradient's norm,
    so that the example is clipped; negative if it stays below C each time.

    Args:
        model, per_example_loss: as for `clipped_gradient`.
        example: a batch of one example.
        norm_rule, backward_passes: as for `clipped_gradient`.
        autocast: the type that the forward pass computes in, if not the model's own.
        shares: C / norm.
    """

    def contribution(bound: float) -> tuple[float, float]:
        device = next(model.parameters()).device.type
        with nullcontext() if autocast is None else torch.autocast(device, autocast):
            result = clipped_gradient(
                model, per_example_loss, example, clipping=Flat(bound), norm_rule=norm_rule,
                backward_passes=backward_passes,
            )  # fmt: skip
        parts = [gradient.double().square().sum() for gradient in result.gradients.values()]
        return float(torch.stack(parts).sum().sqrt()), float(result.norms)

    norm = contribution(1.0)[1]
    bounds = [share * norm for share in shares]
    return max(contribution(bound)[0] / bound - 1 for bound in bounds)
