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


# One float moved to or from memory costs about as much as this many floating point operations on a CPU, the first
# touch of fresh pages included: fitted to kept gradients of linear layers with 49 to 197 positions (AVX-512, 1 core).
_FLOPS_PER_FLOAT = 30
# Strips of Gram matrices are small products: their operations take longer than a weight gradient's by this factor.
_GRAM_SLOWNESS = 1.3
# Floating point operations per second of the model, those of one core; ratios decide, not the level.
_RATE = 1e11


def _instantiate(backward_passes: int) -> Choice:
    return Choice.KEEP if backward_passes == 1 else Choice.DROP


def allowed(backward_passes: int) -> list[Choice]:
    """The choices there are: with two passes nothing is held, so nothing can be kept."""
    return [Choice.GHOST, Choice.DROP, *([Choice.KEEP] if backward_passes == 1 else [])]


def held(choice: Choice, shape: AffineShape) -> int:
    """Numbers per example held from the backward pass to the clipped sum, when there is one pass."""
    return shape.weight_elements if choice is Choice.KEEP else shape.operand_elements


def extra_memory(choice: Choice, shape: AffineShape) -> int:
    """Numbers per example that the norm needs: both Gram matrices, or the gradient itself."""
    return shape.gram_elements if choice is Choice.GHOST else shape.weight_elements


def extra_flops(choice: Choice, shape: AffineShape) -> int:
    """Floating point operations per example beyond a non-private step, whose weight gradient takes `2 t p d`."""
    if choice is Choice.KEEP:
        return 2 * shape.weight_elements  # the weighted sum replaces nothing else: the gradient is needed anyway
    return shape.gram_flops if choice is Choice.GHOST else shape.flops


def seconds(choice: Choice, shape: AffineShape) -> float:
    """Modelled seconds per example beyond a non-private step: operations and memory traffic."""
    traffic = {
        Choice.GHOST: 1.5 * shape.gram_elements,
        Choice.KEEP: 3 * shape.weight_elements,
        Choice.DROP: shape.weight_elements,
    }
    slowness = _GRAM_SLOWNESS if choice is Choice.GHOST else 1.0
    return slowness * extra_flops(choice, shape) / _RATE + traffic_seconds(traffic[choice])


def traffic_seconds(numbers: float) -> float:
    """Modelled seconds to move so many numbers to or from memory."""
    return _FLOPS_PER_FLOAT * numbers / _RATE


def non_private_seconds(gradient_flops: int) -> float:
    """Modelled seconds per example of forward pass, input gradient and weight gradient, equally long."""
    return 3 * gradient_flops / _RATE


def choose(rule: NormRule, shape: AffineShape | None, backward_passes: int) -> Choice:
    """The choice for a use of the given sizes; uses without an affine form are small and always instantiated.

    For `NormRule.AUTO` the one that is modelled as fastest among those that hold no more than activation and output
    gradient; `planner.Planner` weighs all uses of a step together.
    """
    if shape is None or rule is NormRule.INSTANTIATE:
        return _instantiate(backward_passes)
    if rule is NormRule.GHOST:
        return Choice.GHOST
    if rule is NormRule.MIXED:
        ghost = 2 * shape.positions**2 < shape.inputs * shape.outputs
        return Choice.GHOST if ghost else _instantiate(backward_passes)
    neutral = [c for c in allowed(backward_passes) if held(c, shape) <= shape.operand_elements]
    return min(neutral, key=lambda choice: seconds(choice, shape))
