"""The report, written from the numbers."""

from __future__ import annotations

import math
from statistics import mean, stdev

from .methods import (
    BATCH,
    DELTA,
    EPSILON,
    FEATURE_RUNS,
    FINE_TUNING,
    GAIN,
    LAST,
    METHODS,
    MULTIPLES,
    STEPS,
    noise_std,
)


TEXT = """# What post-processing does to accuracy

Written by `recipes/optimisation.py` from `optimisation.json`. Digits recipe at epsilon <= {epsilon:g}, delta =
{delta:g} (prv), {steps} steps of {batch} of 1,437 scans on average, clip norm 1; noise of standard deviation {std:.4f}
in every coordinate of the mean gradient. Accuracy on 360 held-out scans, which epsilon does not cover; neither does it
cover several runs on the same scans, whose epsilons add up. Unit: one training image; neighbours: equal data sets but
for one image that is zeroed out. Mean ± standard deviation over runs, each with new noise and new draws. None of the
methods costs privacy: they work on what epsilon covers already.

Learning rates are not tuned by method, but matched: a coordinate in which there is nothing but noise moves alike under
all of them.

## Fine-tuning biases and head (`digits_beit.yaml`)

Averages are of the same runs as the last iterate above them; differences are paired, ± their standard error.

{fine_tuned}

## A linear head on frozen features of the same model

{feature_runs} runs each, unless a cell says otherwise. At `x 1` the weights move by {gain:g} times the gradient at the
highest rate; the other column is a multiple of that.

{features}

## What to make of it

- A rate that falls to zero (`linear`, the default, or `cosine`) averages the noise out by itself; an average of the
  weights then changes next to nothing.
- At a constant rate that is too high for the last iterate, an average wins back what it loses. Take one where the end
  of a run is not known beforehand, or the rate cannot fall.
- A filter, Adam or DP-AdamBC helps here only if its rows differ from those of SGD by more than runs of one method
  differ among themselves. Other rates, models and epsilons were not measured.

Command: `OMP_NUM_THREADS=1 python recipes/optimisation.py`

Processor time of a run: {times}. {hardware}; {versions}; {date}.
"""


def report(numbers: dict) -> str:
    """Return the report as Markdown."""
    found = {tuple(key.split(" | ")): value for key, value in numbers["accuracies"].items()}
    times = [
        f"{words} {mean(numbers['seconds'][part]):.1f} s"
        for part, words in ((FINE_TUNING, "of fine-tuning"), ("features", "on features"))
        if part in numbers["seconds"]
    ]
    std = noise_std()
    versions = ", ".join(f"{name} {number}" for name, number in numbers["versions"].items())
    fine_tuned = []
    for method in METHODS:
        if (FINE_TUNING, method.name, "1") in found:
            rate = f"{GAIN[FINE_TUNING] * method.rate(std):.2g}"
            fine_tuned += rows_of(method.name, rate, found[(FINE_TUNING, method.name, "1")])
    headings = ["method", "learning rate", "runs", "accuracy", "against its last iterate"]
    return TEXT.format(
        fine_tuned=table(headings, fine_tuned) if fine_tuned else "Not run yet.",
        features=table(
            ["method", "weights", *(f"learning rate x {multiple:g}" for multiple in MULTIPLES)],
            [row for method in METHODS for row in feature_rows(method.name, found)],
        ),
        feature_runs=FEATURE_RUNS, epsilon=EPSILON, delta=DELTA, batch=BATCH, steps=STEPS, std=std,
        times=" and one ".join(times), hardware=numbers["hardware"],
        versions=versions, date=numbers["date"], gain=GAIN["features"],
    )  # fmt: skip


def rows_of(method: str, rate: str, values: dict[str, list[float]]) -> list[list[str]]:
    """One row for the last iterate, one for each average of the same runs, with the mean of their differences."""
    found = []
    for weights, accuracies in values.items():
        name = method if weights == LAST else f"{method}; {weights}"
        against = "" if weights == LAST else difference(accuracies, values[LAST])
        found.append([name, rate, str(len(accuracies)), spread(accuracies), against])
    return found


def feature_rows(method: str, found: dict[tuple[str, str, str], dict[str, list[float]]]) -> list[list[str]]:
    """One row for the last iterates at each learning rate, one for each average of the same runs."""
    of_rate = [found.get(("features", method, f"{multiple:g}"), {}) for multiple in MULTIPLES]
    names = dict.fromkeys(name for values in of_rate for name in values)
    return [[method, name, *(feature_cell(name, values) for values in of_rate)] for name in names]


def feature_cell(weights: str, values: dict[str, list[float]]) -> str:
    """Mean and deviation, and for an average the difference to the last iterate."""
    if weights not in values:
        return "not run"
    text = spread(values[weights])
    if weights != LAST:
        text += f" ({difference(values[weights], values[LAST])})"
    return text if len(values[LAST]) == FEATURE_RUNS else f"{text}, runs: {len(values[LAST])}"


def spread(accuracies: list[float]) -> str:
    """Mean and standard deviation in per cent."""
    deviation = f" ± {100 * stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return f"{100 * mean(accuracies):.1f}{deviation} %"


def difference(accuracies: list[float], last: list[float]) -> str:
    """Mean and standard error of the differences of paired runs, in points."""
    points = [100 * (value - other) for value, other in zip(accuracies, last, strict=True)]
    error = f" ± {stdev(points) / math.sqrt(len(points)):.1f}" if len(points) > 1 else ""
    return f"{mean(points):+.1f}{error} points"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
