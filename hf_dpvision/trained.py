"""Which parameters are trained: those that require a gradient."""

from __future__ import annotations

from torch import nn


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every trainable parameter by its qualified name, one that is shared once, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
