"""What a report may show of a run, chosen by name from its statement, its ledger and its log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from ..evaluations import is_marked, measured
from ..wording import is_protected


Points = tuple[tuple[int, float], ...]  # (optimizer step, value)


@dataclass(frozen=True)
class RunFacts:
    """Everything a report shows.

    Guarantee: if `private` is false, all of it follows from the noisy gradients, from public settings, and from
    metrics on evaluation data that was declared public.

    Attributes:
        statement: the content of `privacy.json`.
        spending: charged steps of the ledger, and an upper bound of epsilon behind each.
        learning_rates: as logged.
        gradient_norms: Euclidean norm of the released mean gradient, as logged.
        evaluations: metric -> values by step, 0 being before training.
        withheld: whether there are evaluations that are not shown.
        settings: public hyper-parameters.
        private: whether the report holds what the guarantee does not cover, so that it must not leave.
    """

    statement: Mapping[str, Any]
    spending: Points
    learning_rates: Points
    gradient_norms: Points
    evaluations: Mapping[str, Points]
    withheld: bool
    settings: Mapping[str, object]
    private: bool

    @property
    def protected(self) -> bool:
        """Whether the run claims a finite epsilon."""
        return is_protected(self.statement)

    @property
    def noise_norm(self) -> float:
        """Root mean square of the norm of the noise in the mean gradient: sqrt(d) sigma C / B; 0 without privacy.

        d is the number of trained parameters, B the expected batch size: public numbers, nothing of the data.
        """
        if not self.protected:
            return 0.0
        trained = self.statement["trainable_parameters"]["trained"]
        return math.sqrt(trained) * self.statement["noise"]["std"] / self.statement["sampling"]["expected_batch_size"]

    @property
    def signal_norms(self) -> Points:
        """Estimated norm of the mean of clipped gradients: sqrt(|g|^2 - |noise|^2) where this is positive.

        Post-processing of what was released: the noise is independent of the rest, and its expected square is known.
        What does not exceed two standard deviations of the square of pure noise cannot be told from nothing and is
        left out.
        """
        squares = ((step, norm**2 - self.noise_norm**2) for step, norm in self.gradient_norms)
        return tuple((step, math.sqrt(square)) for step, square in squares if square > self._spread)

    @property
    def noise_to_signal(self) -> float | None:
        """Norm of the noise over that of the signal, root mean square over the logged steps; None if it is not seen.

        The mean of |g|^2 - |noise|^2 must exceed two standard deviations of what pure noise gives in so many steps.
        """
        if not self.protected or not self.gradient_norms:
            return None
        excess = fmean(norm**2 for _, norm in self.gradient_norms) - self.noise_norm**2
        least = self._spread / math.sqrt(len(self.gradient_norms))
        return self.noise_norm / math.sqrt(excess) if excess > least else None

    @property
    def _spread(self) -> float:
        """Two standard deviations of the square of the norm of pure noise."""
        return self.noise_norm**2 * 2 * math.sqrt(2 / max(1, self.statement["trainable_parameters"]["trained"]))


def facts_of_run(
    statement: Mapping[str, Any],
    spending: Sequence[tuple[int, float]],
    history: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    settings: Mapping[str, object],
) -> tuple[RunFacts | None, RunFacts | None]:
    """Return what may leave, and what has to stay; each is None if there is nothing of the kind.

    A run without a guarantee has nothing that may leave. One that evaluated on data that is not public has a report
    without these metrics, which may leave, and one with them. An entry of the log that carries the mark of private
    metrics stays private, even if the statement says that evaluation data is public now.

    Args:
        statement: the content of `privacy.json`.
        spending: charged steps, and an upper bound of epsilon behind each.
        history: `state.log_history` of the trainer, of which only known names are taken.
        before: metrics of an evaluation before training, named as in a log; empty if there was none.
        settings: public hyper-parameters.
    """
    entries = [{**before, "step": 0}, *history]
    public = not statement["evaluation"]["metrics_are_private"]
    shown = [logs for logs in entries if public and not is_marked(logs)]
    evaluations, released = _evaluations(entries), _evaluations(shown)
    facts = partial(
        RunFacts,
        statement=statement,
        spending=tuple(spending),
        learning_rates=_logged(history, "learning_rate"),
        gradient_norms=_logged(history, "grad_norm"),
        settings=settings,
    )
    whole = facts(evaluations=evaluations, withheld=False, private=True)
    if not is_protected(statement):
        return None, whole
    withheld = evaluations != released
    public_part = facts(evaluations=released, withheld=withheld, private=False)
    return public_part, whole if withheld else None


def _logged(history: Sequence[Mapping[str, Any]], name: str) -> Points:
    points = {logs["step"]: float(logs[name]) for logs in history if name in logs and "step" in logs}
    return tuple((step, value) for step, value in sorted(points.items()) if math.isfinite(value))


def _evaluations(entries: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Metric -> values by step, the last one of each step."""
    found: dict[str, dict[int, float]] = {}
    for logs in entries:
        for name, value in measured(logs).items():
            if math.isfinite(value):
                found.setdefault(name, {})[logs["step"]] = value
    return {name: tuple(sorted(values.items())) for name, values in found.items()}
