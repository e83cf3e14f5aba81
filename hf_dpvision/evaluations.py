"""Metrics of evaluations, as they stand in the log of a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


MARK = "metrics_are_private"  # after the prefix: `eval_metrics_are_private` stands beside `eval_accuracy`
_RUNTIME = "_runtime"  # Trainer adds it to the metrics of every evaluation
_OF_THE_MACHINE = (_RUNTIME, "_samples_per_second", "_steps_per_second", "_model_preparation_time")


def last_evaluation(history: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Return the metrics that were logged last at `step`, without the prefix `eval_` and without times; {} if none."""
    found: dict[str, float] = {}
    for logs in history:
        if logs["step"] == step:
            found |= measured(logs)
    return found


def measured(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one evaluation, without the prefix `eval_` and without times; {} if it was none."""
    if not any(key.startswith("eval_") and key.endswith(_RUNTIME) for key in logs):
        return {}
    metrics = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
    timeless = {key: value for key, value in metrics.items() if not f"_{key}".endswith(_OF_THE_MACHINE)}
    return {key: value for key, value in timeless.items() if isinstance(value, float)}


def is_marked(logs: Mapping[str, Any]) -> bool:
    """Whether metrics carry the mark of private evaluation data."""
    return any(key.endswith(MARK) for key in logs)
