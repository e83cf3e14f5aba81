"""All checks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_dpvision.errors import DPVisionError

from . import checks_data, checks_draws, checks_ledger, checks_noise, checks_sums
from .findings import ALPHA, Finding
from .lab import Lab


STEPS, UNITS, STREAMS, SHARDS = "steps", "units", "streams", "shards"
GROUPS = {
    STEPS: "Single examples by index, in one process",
    UNITS: "Units of several examples",
    STREAMS: "Streams, window by window",
    SHARDS: "A model in shards over two processes",
}


@dataclass(frozen=True)
class Check:
    """One check of the battery.

    Attributes:
        name: by which faults refer to it.
        function: looks at a lab.
        rate: probability of a false alarm.
        group: the kind of run that it looks at.
    """

    name: str
    function: Callable[[Lab], Finding]
    rate: float
    group: str = STEPS

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
_OF_DATA = (
    Check("unit-rate", checks_data.unit_rate, ALPHA, UNITS),
    Check("unit-rows", checks_data.unit_rows, 0.0, UNITS),
    Check("unit-sum", checks_data.unit_sum, 0.0, UNITS),
    Check("unit-sensitivity", checks_data.unit_sensitivity, 0.0, UNITS),
    Check("stream-rate", checks_data.stream_rate, ALPHA, STREAMS),
    Check("stream-across-steps", checks_data.stream_across_steps, ALPHA, STREAMS),
    Check("stream-sum", checks_data.stream_sum, 0.0, STREAMS),
    Check("shard-noise", checks_data.shard_noise, ALPHA, SHARDS),
    Check("shard-sum", checks_data.shard_sum, 0.0, SHARDS),
)
CHECKS = {
    **{name: Check(name, function, ALPHA) for name, function in _STATISTICAL.items()},
    **{name: Check(name, function, 0.0) for name, function in _DETERMINISTIC.items()},
    **{check.name: check for check in _OF_DATA},
}
