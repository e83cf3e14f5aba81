"""Records of runs, read from files of JSON lines, as points: one configuration and method at one epsilon."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_dpvision.errors import ArgumentRefused


TRAINED = {
    "all": "all parameters", "head": "the head", "bias": "biases and head (BiTFiT)", "norm": "norms and head",
    "lora": "low-rank adapters and head (LoRA)",
}  # fmt: skip
MAY_DIFFER = {  # between runs that are averaged: what does not change how a model is trained
    "seed", "output_dir", "target_epsilon", "disable_dp", "compare_non_private", "non_private_learning_rate",
    "results_table", "results_summary", "results_record", "learning_rate",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """All runs of one configuration and method at one target epsilon (infinite: without privacy).

    Args:
        config: stem of the configuration file.
        model, data: in words.
        method: how it was trained, in words.
        target: epsilon that was asked for.
        upper: largest epsilon of these runs, as their ledgers say.
        delta, accountant: of the guarantee.
        events: what one run was charged.
        accuracies: shares of the held-out images, one for each run.
        seeds: of these runs, where they had one.
        settings: by name, seeds and places left out.
        seconds: of one run, on average. With `compared` that of two, the private one and the one without privacy.
        compared: whether a run was one half of a command.
        commands, hardware, versions, dates, notes: without repeats.
    """

    config: str
    model: str
    data: str
    method: str
    target: float
    upper: float
    delta: float | None
    accountant: str
    events: Sequence[Mapping[str, float]]
    accuracies: Sequence[float]
    seeds: Sequence[int]
    settings: Mapping[str, object]
    seconds: float
    compared: bool
    commands: Sequence[str]
    hardware: Sequence[str]
    versions: Sequence[str]
    dates: Sequence[str]
    notes: Sequence[str] = ()

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the runs; None of one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def read(folder: Path) -> list[Point]:
    """Return the points of all records `*.jsonl` in a folder, in the order of files and lines.

    Raises:
        ArgumentRefused: a line is not a record, or runs that would be averaged have different settings.
    """
    points: dict[tuple[object, ...], Point] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found = list(_points(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ArgumentRefused(
                    f"line {number} of {file.name} is no record of a run ({type(error).__name__}: {error}): remove "
                    "it, and run its command again."
                ) from error
            for point in found:
                key = (point.config, point.method, point.target)
                points[key] = _together(points[key], point) if key in points else point
    return list(points.values())


def _points(record: Mapping[str, Any]) -> Iterator[Point]:
    return _of_recipe(record) if "recipe" in record else _of_probe(record)


def _of_recipe(record: Mapping[str, Any]) -> Iterator[Point]:
    settings, trained = record["settings"], record["trained"].split(",")[0]
    kept = {name: value for name, value in sorted(settings.items()) if name not in MAY_DIFFER}
    halves = [half for half in ("private", "non_private") if half in record["scores"]]
    for half in halves:
        private = half == "private"
        rate = settings["learning_rate"]
        if not private and len(halves) > 1:
            rate = settings.get("non_private_learning_rate") or rate
        yield Point(
            config=record["recipe"],
            model=record["model"],
            data=_in_words(record["data"]),
            method=f"the last {trained[5:]} blocks" if trained.startswith("last-") else TRAINED[trained],
            target=settings["target_epsilon"] if private else math.inf,
            upper=record["epsilon"] if private else math.inf,
            delta=record["delta"] if private else None,
            accountant=record["accountant"] if private else "none",
            events=_events(record["mechanism"]) if private else [],
            accuracies=[record["scores"][half][record["metric"]]],
            seeds=[settings.get("seed", 42)],
            settings={**kept, "learning_rate": rate},
            seconds=record["seconds"],
            compared=len(halves) > 1,
            commands=[record["command"]],
            hardware=[record["hardware"]],
            versions=[_versions(record)],
            dates=[record["date"]],
            notes=[record["note"]] if "note" in record else [],
        )


def _in_words(data: str) -> str:
    """As the probe's records have it."""
    return re.sub(r"\d{4,}", lambda found: f"{int(found[0]):,}", data).replace(" train and ", " training and ")


def _of_probe(record: Mapping[str, Any]) -> Iterator[Point]:
    for score in record["scores"]:
        private = score["target"] is not None
        yield Point(
            config=record["name"],
            model=record["model"],
            data=record["data"],
            method=score["method"],
            target=score["target"] if private else math.inf,
            upper=score["upper"] if private else math.inf,
            delta=record["delta"] if private else None,
            accountant=score["accountant"] if private else "none",
            events=score["events"],
            accuracies=score["accuracies"],
            seeds=[],
            settings={"told": record["settings"][score["method"]]},
            seconds=score["seconds"],
            compared=False,
            commands=[record["command"]],
            hardware=[record["hardware"]],
            versions=[_versions(record)],
            dates=[record["date"]],
            notes=[record["note"]] if "note" in record else [],
        )


def _events(mechanism: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
    if mechanism["sampling"] != "poisson":
        raise ValueError(f"sampling {mechanism['sampling']!r} is not what the page describes")
    return mechanism["events"]


def _versions(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in record["versions"].items())


def _together(first: Point, second: Point) -> Point:
    if first.settings != second.settings or first.data != second.data:
        raise ArgumentRefused(
            f"runs of {first.config!r} at epsilon {first.target:g} have different settings, so that a mean of them "
            f"says nothing: {first.data}; {first.settings} and {second.data}; {second.settings}. Remove the records "
            "of one kind, or give it a configuration of its own."
        )
    runs = len(first.accuracies), len(second.accuracies)
    return replace(
        first,
        upper=max(first.upper, second.upper),
        accuracies=[*first.accuracies, *second.accuracies],
        seeds=[*first.seeds, *second.seeds],
        seconds=(runs[0] * first.seconds + runs[1] * second.seconds) / sum(runs),
        compared=first.compared or second.compared,
        commands=unique([*first.commands, *second.commands]),
        hardware=unique([*first.hardware, *second.hardware]),
        versions=unique([*first.versions, *second.versions]),
        dates=unique([*first.dates, *second.dates]),
        notes=unique([*first.notes, *second.notes]),
    )


def unique(texts: Iterable[str]) -> list[str]:
    """Return the texts in order without repeats."""
    return list(dict.fromkeys(texts))
