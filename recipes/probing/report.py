"""What a run of the linear probe found, as Markdown between markers; no number is typed by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_dpvision.accounting.claim import round_up
from hf_dpvision.results import split_at_markers


TITLE = """# A linear head on frozen features

Written by `recipes/linear_probe.py`, a section by each configuration. A frozen model turns every image into features
once; heads are fitted to these, with privacy and without. Accuracies are on held-out images, which epsilon does not
cover; neither does it cover the choice of settings, or several fits to the same images, whose epsilons add up. Unit:
one training image. Neighbours: equal data sets but for one image that is zeroed out; their number is public.
"""
TARGETS = {1.0: 1.0, 8.0: 0.5}  # epsilon -> most points below the non-private head, aimed at


@dataclass(frozen=True)
class Score:
    """Accuracies of the repeated fits of one method at one target epsilon (infinite: without privacy).

    Args:
        upper: largest epsilon of these fits, as the ledger says.
        accountant: whose it is.
        events: what these fits were charged each, as mappings of the fields of `accounting.Event`.
        seconds: of one fit, on average.
    """

    method: str
    target: float
    upper: float
    accountant: str
    accuracies: Sequence[float]
    seconds: float
    events: Sequence[Mapping[str, float]] = ()

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation of the fits; 0 of one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True)
class Record:
    """One run. `features` says what was computed and in which time; `settings` has a text for each method."""

    name: str
    command: str
    model: str
    data: str
    features: str
    repeats: int
    delta: float
    settings: Mapping[str, str]
    scores: Sequence[Score]
    seconds: float
    hardware: str
    versions: Mapping[str, str]
    date: str

    def to_record(self) -> dict[str, object]:
        """Return the run for a file of JSON lines, where no epsilon at all stands for an infinite one."""
        content = asdict(self)
        for score in content["scores"]:
            score |= {name: None if math.isinf(score[name]) else score[name] for name in ("target", "upper")}
        return content

    def find(self, method: str, target: float) -> Score | None:
        return next((s for s in self.scores if s.method == method and s.target == target), None)


def markdown(record: Record, plot: str | None) -> str:
    """The section of one configuration."""
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    lines = [f"## {record.name}", ""]
    lines += [f"{record.model} on {record.data}, delta = {record.delta:g}. Mean and standard deviation of"]
    lines += [
        f"{record.repeats} private fits each, with noise from the operating system and so without a seed; without"
    ]
    lines += ["privacy one fit, which nothing random enters.", "", *table(record), ""]
    lines += [f"![accuracy against epsilon]({plot})", ""] if plot else []
    lines += [f"- {method}: {text}." for method, text in record.settings.items()]
    lines += [*gaps(record), ""]
    lines += [f"Command: `{record.command}`", ""]
    lines += [f"{record.features} The rest took {record.seconds / 60:.1f} minutes. {record.hardware}; {versions};"]
    lines += [f"{record.date}.", ""]
    return "\n".join(lines)


def table(record: Record) -> list[str]:
    """Accuracy by method and epsilon."""
    targets = sorted({score.target for score in record.scores})
    heads = ["method", *(_target(record, target) for target in targets), "time of one fit"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for method in record.settings:
        scores = [record.find(method, target) for target in targets]
        slowest = max(score.seconds for score in scores if score is not None)
        lines.append("| " + " | ".join([method, *map(_cell, scores), f"{slowest:.1f} s"]) + " |")
    return lines


def gaps(record: Record) -> list[str]:
    """How far the best private head lies below the best one without privacy, beside what is aimed at."""
    lines = []
    plain = [score for score in record.scores if math.isinf(score.target)]
    for target, aim in TARGETS.items():
        private = [score for score in record.scores if score.target == target]
        if plain and private:
            best, reference = max(private, key=lambda s: s.mean), max(plain, key=lambda s: s.mean)
            gap = 100 * (reference.mean - best.mean)
            lines.append(
                f"- At epsilon {target:g} the best head ({best.method}) lies {gap:.1f} points below the best one "
                f"without privacy ({reference.method}); at most {aim:g} is aimed at with all 50,000 CIFAR-10 images."
            )
    return lines


def write(path: Path, record: Record, plot: str | None) -> None:
    """Put the section into the report, replacing an earlier one of the same configuration."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TITLE, encoding="utf-8")
    begin, end = f"<!-- {record.name}: written by the run, do not edit -->", f"<!-- end of {record.name} -->"
    before, _, after = split_at_markers(path, begin, end)
    path.write_text(f"{before}{begin}\n{markdown(record, plot)}{end}{after}", encoding="utf-8")


def _target(record: Record, target: float) -> str:
    if math.isinf(target):
        return "non-private"
    upper = max(score.upper for score in record.scores if score.target == target)
    return f"epsilon <= {round_up(upper, digits=2)}"


def _cell(score: Score | None) -> str:
    if score is None:
        return "not run"
    spread = f" ± {100 * score.spread:.1f}" if len(score.accuracies) > 1 else ""
    return f"{100 * score.mean:.1f}{spread} %"
