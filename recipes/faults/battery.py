"""All checks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_dpvision.errors import DPVisionError

from . import checks_draws, checks_ledger, checks_noise, checks_sums
from .findings import ALPHA, Finding
from .lab import Lab


@dataclass(frozen=True)
class Check:
    """One check of the battery.

    Attributes:
        name: by which faults refer to it.
        function: looks at a lab.
        rate: probability of a false alarm.
    """

    name: str
    function: Callable[[Lab], Finding]
    rate: float

    @property
    def what(self) -> str:
        """What must hold, in a sentence."""
        return " ".join(self.function.__doc__.split())

    def __call__(self, lab: Lab) -> Finding:
        """Look; a run that the package refuses is an alarm as well, with the error's name."""
        try:
            return self.function(lab)
        except DPVisionError as error:
            return Finding(True, f"refused: {type(error).__name__}")


_STATISTICAL = {
    "noise-scale": checks_noise.scale,
    "noise-shape": checks_noise.shape,
    "noise-resolution": checks_noise.resolution,
    "noise-complete": checks_noise.complete,
    "noise-across-steps": checks_noise.across_steps,
    "noise-across-coordinates": checks_noise.across_coordinates,
    "noise-across-runs": checks_noise.across_runs,
    "noise-after-resume": checks_noise.after_resume,
    "noise-over-ranks": checks_noise.over_ranks,
    "empty-steps": checks_noise.empty_steps,
    "draws-rate": checks_draws.rate,
    "draws-batch-sizes": checks_draws.batch_sizes,
    "draws-across-steps": checks_draws.across_steps,
    "draws-across-examples": checks_draws.across_examples,
    "draws-no-repeats": checks_draws.no_repeats,
    "draws-key": checks_draws.key_is_fresh,
    "draws-after-resume": checks_draws.after_resume,
}
_DETERMINISTIC = {
    "sum-ghost": checks_sums.ghost,
    "sum-instantiated": checks_sums.instantiated,
    "sum-every-parameter": checks_sums.every_parameter,
    "sum-over-draw": checks_sums.over_draw,
    "divisor": checks_sums.divisor,
    "sensitivity": checks_sums.sensitivity,
    "microbatches": checks_sums.microbatches,
    "not-finite": checks_sums.not_finite,
    "draws-over-ranks": checks_draws.over_ranks,
    "ledger-steps": checks_ledger.steps,
    "ledger-first": checks_ledger.charged_first,
    "ledger-rates": checks_ledger.rates,
    "ledger-budget": checks_ledger.budget,
    "ledger-after-resume": checks_ledger.after_resume,
    "claim": checks_ledger.claim,
    "disk": checks_ledger.left_on_disk,
    "logs": checks_ledger.nothing_private_returned,
}
CHECKS = {
    **{name: Check(name, function, ALPHA) for name, function in _STATISTICAL.items()},
    **{name: Check(name, function, 0.0) for name, function in _DETERMINISTIC.items()},
}
