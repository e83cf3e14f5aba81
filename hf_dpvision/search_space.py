"""What a search over settings may vary, and how candidates are drawn: at random, before any data is looked at."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import ArgumentRefused


# Settings that neither say whom the guarantee protects nor where things are written: how an optimizer uses noisy
# gradients and which average of the iterates is released (post-processing), how the clip norm is divided (the noise is
# that of all of it), and how many views of an image are averaged before clipping.
_FREE = (
    "learning_rate", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "noise_bias_correction", "noise_bias_floor",
    "low_pass_filter", "low_pass_cutoff", "ema_decay", "tail_averaging", "per_sample_max_grad_norm", "clipping",
    "clipping_groups", "group_clipping", "clipping_shares", "augmentation_multiplicity",
)  # fmt: skip
# Those that epsilon depends on: they may differ between runs only if all runs are composed.
_PRICED = ("logical_batch_size", "max_steps", "num_train_epochs", "noise_multiplier")

Space = Callable[["Draws"], Mapping[str, Any]]


class Draws:
    """What a search space draws from, by the methods of an optuna trial; the operating system's entropy decides.

    Nobody can repeat or predict the draws, and they do not depend on data or on earlier results.
    """

    def __init__(self) -> None:
        self._random = secrets.SystemRandom()

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Return a number from `low` to `high`, uniform, or uniform in its logarithm, or on a grid of steps.

        Raises:
            ArgumentRefused: the range is empty, or cannot be drawn from in this way.
        """
        self._refuse_range(name, low, high, log, step is not None)
        if step is not None:
            _refuse_step(name, step)
            return low + step * self._random.randrange(math.floor((high - low) / step + 1e-9) + 1)
        if log:
            return min(high, max(low, math.exp(self._random.uniform(math.log(low), math.log(high)))))
        return self._random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Return a whole number from `low` to `high`, both included; arguments as for `suggest_float`."""
        self._refuse_range(name, low, high, log, step != 1)
        if log:
            drawn = round(math.exp(self._random.uniform(math.log(low - 0.5), math.log(high + 0.5))))
            return min(high, max(low, drawn))
        _refuse_step(name, step)
        return low + step * self._random.randrange((high - low) // step + 1)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices, each with the same probability."""
        if not choices:
            raise ArgumentRefused(f"The search space gives no choice for {name!r}.")
        return self._random.choice(list(choices))

    @staticmethod
    def _refuse_range(name: str, low: float, high: float, log: bool, stepped: bool) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and low <= high) or (log and (low <= 0 or stepped)):
            raise ArgumentRefused(
                f"The range of {name!r}, from {low!r} to {high!r}, cannot be drawn from: it must be finite and not "
                "empty, and above 0 and without steps if log=True."
            )


def _refuse_step(name: str, step: float) -> None:
    if not step > 0:
        raise ArgumentRefused(f"The range of {name!r} has step={step!r}, which must be above 0.")


def drawn_candidates(space: Space, runs: int, *, composed: bool, calibrated: bool) -> list[dict[str, Any]]:
    """Draw the settings of so many runs.

    Args:
        space: gives the settings of one run, from the draws it is lent.
        runs: how many.
        composed: whether all runs are composed, so that they may cost differently.
        calibrated: whether the noise follows from a target.

    Raises:
        ArgumentRefused: a setting may not be searched over, or cannot be written down.
    """
    candidates = [dict(space(Draws())) for _ in range(runs)]
    for candidate in candidates:
        _refuse_settings(candidate, composed)
        if calibrated and "noise_multiplier" in candidate:
            raise ArgumentRefused(
                "The search space varies 'noise_multiplier', and target_epsilon decides about the noise of all runs. "
                "Leave one of them out."
            )
    return candidates


def _refuse_settings(candidate: Mapping[str, Any], composed: bool) -> None:
    for name, value in candidate.items():
        if name in _PRICED and not composed:
            raise ArgumentRefused(
                f"The search space varies {name!r}: with random stopping every run must cost the same, for epsilon "
                "follows from one of them. Set it in the arguments, or leave out stopping, so that all runs are "
                "composed."
            )
        if name not in _FREE + _PRICED:
            raise ArgumentRefused(
                f"The search space varies {name!r}, which cannot be searched over. What can: "
                f"{', '.join(_FREE + _PRICED)}."
            )
        if not _is_plain(value):
            raise ArgumentRefused(
                f"The search space gives {name}={value!r}, a {type(value).__name__}: candidates are written to disk "
                "before they are tried, so use numbers, text, or mappings of these."
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    return value is None or isinstance(value, (str, int, float, bool))
