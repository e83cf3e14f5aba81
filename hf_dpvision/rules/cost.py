"""Ghost or instantiate: what is done with one tensor's per-example gradients in one use."""

from __future__ import annotations

from enum import Enum, StrEnum

from .affine import AffineShape


class NormRule(StrEnum):
    """How the norm of each use is obtained."""

    AUTO = "auto"  # our cost model: time, under a memory bound
    MIXED = "mixed"  # the paper's memory rule: ghost if 2 t^2 < p d (Bu, Mao, Xu 2022, arXiv:2205.10683)
    GHOST = "ghost"
    INSTANTIATE = "instantiate"


class Choice(Enum):
    """What happens to one use's gradients once the backward pass hands them over."""

    GHOST = "ghost"  # norm from Gram matrices; activation and output gradient are held for the sum
    KEEP = "keep"  # instantiate and hold the gradients; activation and output gradient are released
    DROP = "drop"  # instantiate for the norm only; the sum is computed from activation and output gradient


# One float moved to or from memory costs about as much as this many floating point operations on a CPU.
_FLOPS_PER_FLOAT = 8


def _instantiate(backward_passes: int) -> Choice:
    return Choice.KEEP if backward_passes == 1 else Choice.DROP


def extra_memory(choice: Choice, shape: AffineShape) -> int:
    """Numbers per example that the norm needs: both Gram matrices, or the gradient itself."""
    return shape.gram_elements if choice is Choice.GHOST else shape.weight_elements


def extra_flops(choice: Choice, shape: AffineShape) -> int:
    """Floating point operations per example beyond a non-private step, whose weight gradient takes `2 t p d`."""
    gradient = 2 * shape.positions * shape.weight_elements
    if choice is Choice.KEEP:
        return 2 * shape.weight_elements  # the weighted sum replaces nothing else: the gradient is needed anyway
    return shape.gram_flops if choice is Choice.GHOST else gradient


def _cheapest(shape: AffineShape, backward_passes: int) -> Choice:
    """The least time per example among the choices that hold no more than activation and output gradient."""
    traffic = {
        Choice.GHOST: 1.5 * shape.gram_elements,
        Choice.KEEP: 3 * shape.weight_elements,
        Choice.DROP: shape.weight_elements,
    }
    allowed = [Choice.GHOST, Choice.DROP]
    held = shape.groups * shape.positions * (shape.inputs + shape.outputs)
    if backward_passes == 1 and shape.weight_elements <= held:
        allowed.append(Choice.KEEP)
    return min(
        allowed, key=lambda c: extra_flops(c, shape) + _FLOPS_PER_FLOAT * traffic[c]
    )


def choose(rule: NormRule, shape: AffineShape | None, backward_passes: int) -> Choice:
    """The choice for a use of the given sizes; uses without an affine form are small and always instantiated."""
    if shape is None or rule is NormRule.INSTANTIATE:
        return _instantiate(backward_passes)
    if rule is NormRule.GHOST:
        return Choice.GHOST
    if rule is NormRule.MIXED:
        ghost = 2 * shape.positions**2 < shape.inputs * shape.outputs
        return Choice.GHOST if ghost else _instantiate(backward_passes)
    return _cheapest(shape, backward_passes)
