"""What a recipe run found: a record, a printed table, a row of `recipes/README.md`. No number is typed by hand."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from .accounting.claim import round_up
from .errors import ArgumentRefused


BEGIN, END = "<!-- results: written by the recipes, do not edit -->", "<!-- end of results -->"
HEADINGS = (
    "recipe",
    "command",
    "model",
    "data",
    "trained",
    "privacy of the private run",
    "before",
    "private",
    "non-private",
    "time",
    "hardware",
    "versions",
    "date",
)
SUMMARY = tuple(heading for heading in HEADINGS if heading not in ("command", "versions", "date"))
_PACKAGES = ("torch", "transformers", "timm", "datasets", "prv-accountant")


@dataclass(frozen=True)
class RecipeRecord:
    """One run of a recipe.

    Args:
        recipe: short name of the configuration.
        command: what was typed, without paths of the machine.
        settings: every public setting that differs from the defaults.
        model, data, trained: in words.
        epsilon: upper bound; None for a run without a private part.
        delta, accountant: as the statement says.
        metric: name of the value compared, such as `accuracy`.
        scores: all metrics on held-out data of the models `before`, `private` and `non_private`, as far as run.
        seconds: of the whole run.
        unit: whom epsilon protects, in words; None: one training image.
        mechanism: what epsilon was computed from, `sampling` and `events` as in the statement; None without privacy.
        hardware, versions, date: of the run; date as YYYY-MM-DD.
    """

    recipe: str
    command: str
    settings: Mapping[str, object]
    model: str
    data: str
    trained: str
    epsilon: float | None
    delta: float | None
    accountant: str | None
    metric: str
    scores: Mapping[str, Mapping[str, float]]
    seconds: float
    hardware: str
    versions: Mapping[str, str]
    date: str
    unit: str | None = None
    mechanism: Mapping[str, object] | None = None

    def score(self, model: str) -> float | None:
        """Return the compared value of one of the models, None if it was not run."""
        return self.scores.get(model, {}).get(self.metric)

    def to_json(self) -> str:
        """Return the record with a note on what epsilon covers."""
        note = "The values on held-out data are not covered by epsilon; neither is the non-private model."
        return json.dumps({**asdict(self), "note": note}, indent=2, allow_nan=False) + "\n"


def append_record(path: Path, record: Mapping[str, object]) -> None:
    """Add one line of JSON to a file that has a line for every run; the file is made if it is not there."""
    line = json.dumps(record, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def environment() -> tuple[str, dict[str, str]]:
    """Return the hardware in words and the versions of the packages that decide a result."""
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"{_processor()}, torch threads: {torch.get_num_threads()}"
    versions = {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}
    return hardware, versions


def comparison_table(record: RecipeRecord) -> str:
    """Return the plain-text table that a run ends with: one line per model."""
    privacy = {"before": "no private image used", "private": _privacy(record), "non_private": "none"}
    titles = {"before": "before fine-tuning", "private": "private", "non_private": "non-private"}
    cells = [("model", "privacy", record.metric)]
    cells += [(titles[model], privacy[model], _percent(record.score(model))) for model in record.scores]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def update_results_table(path: Path, record: RecipeRecord, headings: Sequence[str] = HEADINGS) -> None:
    """Write the record's row between the markers of a Markdown file, replacing an earlier row of the same recipe.

    A file without markers, or no file yet, gets them at its end.

    Args:
        path: of the Markdown file.
        record: of the run.
        headings: the columns, all of them or `SUMMARY`.

    Raises:
        ArgumentRefused: the file has one marker without the other.
    """
    before, inside, after = split_at_markers(path, BEGIN, END)
    others = [line for line in inside.splitlines() if line.startswith("| `") and f"| `{record.recipe}` " not in line]
    head = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines = [BEGIN, *head, *sorted([*others, _row(record, headings)]), END]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + "\n".join(lines) + after, encoding="utf-8")


def split_at_markers(path: Path, begin: str, end: str) -> tuple[str, str, str]:
    """Return what stands before, between and after two markers of a text file, the markers left out.

    A file without markers, or no file yet, is taken to have them at its end.

    Raises:
        ArgumentRefused: the file has one marker without the other.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if (begin in text) != (end in text):
        raise ArgumentRefused(f"{path} has only one of the two markers {begin!r} and {end!r}: restore the other one.")
    if begin not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    before, rest = text.split(begin, 1)
    inside, after = rest.split(end, 1)
    return before, inside, after


def _row(record: RecipeRecord, headings: Sequence[str]) -> str:
    cells = (
        f"`{record.recipe}`",
        f"`{record.command}`",
        record.model,
        record.data,
        record.trained,
        _privacy(record),
        *(_percent(record.score(model)) for model in ("before", "private", "non_private")),
        f"{record.seconds / 60:.1f} min",
        record.hardware,
        ", ".join(f"{name} {number}" for name, number in record.versions.items()),
        record.date,
    )
    by_heading = dict(zip(HEADINGS, cells, strict=True))
    shown = (by_heading[heading].replace("|", "\\|").replace("\n", " ") for heading in headings)
    return "| " + " | ".join(shown) + " |"


def _privacy(record: RecipeRecord) -> str:
    if record.epsilon is None:
        return "none"
    text = f"epsilon <= {round_up(record.epsilon, digits=2)}, delta = {record.delta:g} ({record.accountant})"
    return text if record.unit is None else f"{text}, unit: {record.unit}"


def _percent(value: float | None) -> str:
    return "not run" if value is None else f"{100 * value:.1f} %"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({os.cpu_count()} cores)"
