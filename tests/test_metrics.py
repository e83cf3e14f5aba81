"""Our metrics equal a count by hand and need no network."""

from __future__ import annotations

import socket

import evaluate
import numpy as np
import pytest
import sklearn.metrics
from transformers import EvalPrediction

from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.metrics import Accuracy, TopKAccuracy, best_classes, compute_metrics_for, load_metric


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def _random(n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(n)
    return generator.normal(size=(n, classes)), generator.integers(0, classes, n)


def test_both_are_evaluate_metrics_and_agree_with_scikit_learn():
    logits, labels = _random(300, 10)
    assert isinstance(Accuracy(), evaluate.Metric) and isinstance(TopKAccuracy(), evaluate.Metric)
    values = compute_metrics_for(10)(EvalPrediction(logits, labels))
    assert values["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, logits.argmax(1)))
    expected = sklearn.metrics.top_k_accuracy_score(labels, logits, k=5, labels=np.arange(10))
    assert values["top5_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize(("classes", "with_top5"), [(2, False), (5, False), (6, True)])
def test_top5_is_given_for_more_than_five_classes_only(classes, with_top5):
    values = compute_metrics_for(classes)(EvalPrediction(*_random(20, classes)))
    assert ("top5_accuracy" in values) is with_top5


def test_the_function_can_be_called_again_and_takes_tuples_of_outputs():
    compute, (logits, labels) = compute_metrics_for(10), _random(50, 10)
    first = compute(EvalPrediction(logits, labels))
    assert compute(EvalPrediction((logits, "hidden states"), labels)) == first
    assert all(type(value) is float for value in first.values())


def test_a_non_finite_logit_counts_as_wrong():
    logits, labels = np.zeros((2, 6)), np.zeros(2, dtype=int)
    logits[1, 3] = np.nan
    assert compute_metrics_for(6)(EvalPrediction(logits, labels)) == {"accuracy": 0.5, "top5_accuracy": 0.5}
    assert best_classes(logits, 2).tolist() == [[0, 1], [-1, -1]]


def test_no_examples_are_refused():
    with pytest.raises(ArgumentRefused, match="no examples"):
        Accuracy().compute(predictions=np.zeros(0, dtype=int), references=np.zeros(0, dtype=int))


def test_a_metric_script_is_loaded_by_its_path_and_gets_its_options(tmp_path):
    script = tmp_path / "share.py"
    script.write_text(
        "import datasets\n"
        "import evaluate\n"
        "class Share(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        value = datasets.Value('int64')\n"
        "        features = datasets.Features({'predictions': value, 'references': value})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n"
        "    def _compute(self, predictions, references, of):\n"
        "        return {'share': sum(p == of for p in predictions) / len(predictions)}\n"
    )
    logits, labels = _random(40, 4)
    values = compute_metrics_for(4, str(script), {"of": 2})(EvalPrediction(logits, labels))
    assert values == {"share": pytest.approx(np.mean(logits.argmax(1) == 2))}


def test_a_metric_that_needs_the_network_says_so():
    with pytest.raises(ArgumentRefused, match="without a network use 'accuracy'"):
        load_metric("no-such-metric-anywhere")
