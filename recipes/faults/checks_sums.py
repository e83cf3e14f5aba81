"""Checks of what is summed: compared with a float64 loop over single examples, and moved by at most C by anyone."""

from __future__ import annotations

import torch

from .findings import Finding, at_most
from .lab import BOUND, WAYS, Lab, Sum
from .models import Pictures, everything
from .oracle import Oracle


EXACT, OWN, ROUNDING = 1e-4, 1e-3, 1e-5


def _error(found: Sum, steps: list[list[int]]) -> Finding:
    truth = found.oracle.sums(steps)
    errors = (found.seen.matrix - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(found.oracle.bound)
    return at_most(float(errors.max()), EXACT, "relative error")


def ghost(lab: Lab) -> Finding:
    """The released sum over the examples read is that of the loop, norms by Gram matrices, one pass."""
    return _error(lab.ghost, lab.ghost.seen.read)


def instantiated(lab: Lab) -> Finding:
    """The released sum over the examples read is that of the loop, norms by instantiated gradients, two passes."""
    return _error(lab.instantiated, lab.instantiated.seen.read)


def over_draw(lab: Lab) -> Finding:
    """The released sum is that over the examples drawn, each once: all of them are trained on, and nobody else."""
    return _error(lab.ghost, lab.ghost.planned)


def every_parameter(lab: Lab) -> Finding:
    """Every single parameter's sum is that of the loop, however small beside the others."""
    worst, name_of_worst = 0.0, ""
    for found in (lab.ghost, lab.instantiated):
        seen, truth = found.seen, found.oracle.sums(found.seen.read)
        true_parts = seen.by_parameter(truth)
        for name, part in seen.by_parameter(seen.matrix - truth).items():
            error = float(part.norm() / true_parts[name].norm())
            if not error <= worst:
                worst, name_of_worst = error, name
    return at_most(worst, OWN, f"{name_of_worst or 'none'}: relative error")


def divisor(lab: Lab) -> Finding:
    """Every step is divided by the expected batch size, however many examples were drawn."""
    seen, truth = lab.ghost.seen, lab.ghost.oracle.sums(lab.ghost.seen.read)
    length = truth.square().sum(1)
    drawn = length > 0
    ratio = (seen.matrix * truth).sum(1)[drawn] / length[drawn]
    return at_most(float((ratio - 1).abs().max()), EXACT, "divisor off by")


def sensitivity(lab: Lab) -> Finding:
    """Zeroing out one record moves the sum by at most C, for each record of a set with twins and outliers."""
    return at_most(max(lab.moved) - 1, ROUNDING, "moved beyond C by")


def microbatches(lab: Lab) -> Finding:
    """The sum does not depend on how many examples the device takes at once."""
    pictures = Pictures(8, spread=1.0)
    sums = [lab.once(f"at-once-{size}", pictures, per_device_train_batch_size=size) for size in (1, 3, 8)]
    errors = [float((other - sums[0]).norm() / sums[0].norm()) for other in sums[1:]]
    return at_most(max(errors), EXACT, "relative difference")


def not_finite(lab: Lab) -> Finding:
    """Examples whose gradients are not finite contribute exactly nothing, and nothing of the others is lost."""
    poisoned = Pictures(8, spread=0.5, poison={2: float("inf"), 5: float("nan")})
    clean = Pictures(8, spread=0.5)
    oracle = Oracle(everything(), clean, BOUND)
    truth = oracle.sums([[row for row in range(8) if row not in poisoned.poison]])[0]
    worst = 0.0
    for way, options in WAYS.items():
        error = float((lab.once(f"{way}-poisoned", poisoned, **options) - truth).norm() / truth.norm())
        worst = max(worst, torch.inf if error != error else error)
    return at_most(worst, EXACT, "relative error")
