"""Metrics that need no network, as `evaluate.Metric` objects, and the function `Trainer` calls with them.

`evaluate.load("accuracy")` fetches code from the Hub, so a machine without a connection could not even report an
accuracy. The two everyone needs are here; `load_metric` takes any other by name, path or object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from .errors import ArgumentRefused


class Accuracy(evaluate.Metric):
    """Share of predicted classes [n] that equal the reference classes [n]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of examples whose predicted class is the reference class.",
            citation="",
            inputs_description="predictions: class indices [n]; references: class indices [n].",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        _refuse_empty(references)
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class TopKAccuracy(evaluate.Metric):
    """Share of examples whose reference class is among the k ranked classes [n, k]; `k` is read off the input."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of examples whose reference class is among the k most likely ones.",
            citation="",
            inputs_description="predictions: the k best class indices [n, k]; references: class indices [n].",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        _refuse_empty(references)
        ranked = np.asarray(predictions)
        hits = (ranked == np.asarray(references)[:, None]).any(axis=1)
        return {f"top{ranked.shape[1]}_accuracy": float(np.mean(hits))}


def load_metric(name_or_metric: str | evaluate.EvaluationModule) -> evaluate.EvaluationModule:
    """Return our own metric for `"accuracy"`, else what `evaluate.load` finds under this name or path.

    Predictions and references stay in memory: evaluate's usual cache file would leave them on disk.

    Raises:
        ArgumentRefused: nothing is found, for instance because there is no network.
    """
    if isinstance(name_or_metric, evaluate.EvaluationModule):
        return name_or_metric
    if name_or_metric == "accuracy":
        return Accuracy(keep_in_memory=True)
    try:
        return evaluate.load(name_or_metric, keep_in_memory=True)
    except (OSError, ImportError, ValueError) as error:
        raise ArgumentRefused(
            f"metric {name_or_metric!r} cannot be loaded ({type(error).__name__}: {error}): without a network use "
            "'accuracy' or the path of a metric script."
        ) from error


def compute_metrics_for(
    num_classes: int,
    metric: str | evaluate.EvaluationModule = "accuracy",
    options: Mapping[str, object] | None = None,
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the `compute_metrics` function of a `Trainer` whose model gives logits [n, num_classes].

    Accuracy is accompanied by the top-5 accuracy when there are more than five classes. An example with a
    non-finite logit counts as wrong for every one of our metrics.

    Args:
        metric: see `load_metric`; it gets predicted classes [n] and reference classes [n].
        options: further arguments of that metric's `compute`, such as `{"average": "macro"}` for F1.
    """
    chosen = load_metric(metric)
    top5 = TopKAccuracy(keep_in_memory=True) if isinstance(chosen, Accuracy) and num_classes > 5 else None

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
        labels = np.asarray(prediction.label_ids)
        best = best_classes(logits, 1)[:, 0]
        values = dict(chosen.compute(predictions=best, references=labels, **(options or {})))
        if top5 is not None:
            values |= top5.compute(predictions=best_classes(logits, 5), references=labels)
        return values

    return compute_metrics


def best_classes(logits: np.ndarray, k: int) -> np.ndarray:
    """Return the k most likely classes of logits [n, c], best first, as [n, k]; -1 where a logit is not finite."""
    finite = np.isfinite(logits).all(axis=1, keepdims=True)
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return np.where(finite, ranked, -1)


def _refuse_empty(references: Sized) -> None:
    if len(references) == 0:
        raise ArgumentRefused("no examples to evaluate: an accuracy of nothing is undefined. Give a held-out part.")
