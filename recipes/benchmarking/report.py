"""The measurements as JSON, as Markdown and as the table that the README quotes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_dpvision.results import split_at_markers

from .cases import Trained
from .measure import CaseResult, SideResult, Spread, largest_batch
from .reasons import HEADING, section


BEGIN, END = "<!-- benchmark: written by recipes/benchmark.py, do not edit -->", "<!-- end of benchmark -->"
OURS, PEER = "ours, one pass", "Opacus hooks"
FASTER_THAN_PEER, LARGER_THAN_PEER = 6.0, 50.0  # aimed at on VGG-19


@dataclass(frozen=True)
class Record:
    """One run of the benchmark.

    Args:
        command: what was typed, without paths.
        threads: of torch.
        rounds, other_rounds: of the non-private step and our default; of the other sides.
        memory_gib: for the largest batch.
        load: load averages of the machine over one minute, when the run began and after every case.
        hardware, versions, date: of the run.
        cases: the measurements.
    """

    command: str
    threads: int
    rounds: int
    other_rounds: int
    memory_gib: float
    load: list[float]
    hardware: str
    versions: Mapping[str, str]
    date: str
    cases: Sequence[CaseResult]

    def to_json(self) -> str:
        """Everything measured, with the summaries that the tables show."""
        content = {**asdict(self), "cases": [self._case(case) for case in self.cases]}
        return json.dumps(content, indent=1, default=lambda value: value.value) + "\n"

    def _case(self, result: CaseResult) -> dict[str, Any]:
        sides = []
        for side in result.sides:
            summary = {
                "time_ratio": result.time_ratio(side),
                "least_ratio": result.least_ratio(side),
                "wall_ratio": result.wall_ratio(side),
                "memory_ratio": result.memory_ratio(side),
                "largest_batch": largest_batch(side, self.memory_gib),
            }
            sides.append(asdict(side) | {key: asdict(v) if isinstance(v, Spread) else v for key, v in summary.items()})
        content = {**asdict(result), "sides": sides, "noise_ratio": result.noise_ratio()}
        if result.reasons is not None:
            content["reasons"]["operations"] |= {
                "least_ratio": result.reasons.operations.least_ratio,
                "planned_ratio": result.reasons.operations.planned_ratio,
            }
        return content


def title(result: CaseResult) -> str:
    """Model, pixels, batch and, if not all, what is trained."""
    case = result.case
    trained = {
        Trained.ALL: "", Trained.BIAS: ", bias and head trained", Trained.HEAD: ", head trained",
        Trained.LAYERS: ", raw parameters frozen",
    }  # fmt: skip
    return f"{case.title}, {case.image_size} px, batch {case.batch_size}{trained[case.trained]}"


def main_table(record: Record) -> list[str]:
    """Our default against the non-private step and against the target: a row per case."""
    lines = []
    for result in record.cases:
        ours, target = result.find(OURS), result.case.target
        time, memory = result.time_ratio(ours), result.memory_ratio(ours)
        if time is None:
            lines.append((title(result), ours.fault, "", "", "", ""))
            continue
        goals = ("", "", "") if target is None else (
            f"{target.time:.2f}", f"{target.memory:.2f}",
            {0: "missed", 1: "one of two", 2: "met"}[(time.median <= target.time) + (memory <= target.memory)],
        )  # fmt: skip
        lines.append((title(result), spread(time), goals[0], f"{memory:.2f}", goals[1], goals[2]))
    return table(("model", "time", "at most", "memory", "at most", "targets"), lines)


def side_table(result: CaseResult, memory_gib: float) -> list[str]:
    """Every side of a case."""
    lines = []
    for side in result.sides:
        time, wall, memory = result.time_ratio(side), result.wall_ratio(side), result.memory_ratio(side)
        if time is None:
            lines.append((side.name, side.fault, "", "", "", "", ""))
            continue
        fits = largest_batch(side, memory_gib)
        gradients = side.fault or f"agree, {side.gradient_error:.0e}"
        numbers = (
            spread(time),
            f"{result.least_ratio(side):.2f}",
            str(time.count),
            f"{wall.median:.2f}",
            f"{memory:.2f}",
        )
        lines.append((side.name, gradients, *numbers, "" if fits is None else f"{fits:,}"))
    largest = f"largest batch in {memory_gib:g} GiB"
    head = ("side", "gradients", "time", "least", "rounds", "wall time", "memory", largest)
    shown = head if any(line[-1] and len(line) == len(head) for line in lines) else head[:-1]
    return table(shown, [(*line, "")[: len(shown)] for line in lines])


def against_peer(record: Record) -> list[str]:
    """Our default against Opacus hooks, where both ran: a line per case."""
    lines = []
    for result in record.cases:
        ours, peer = result.find(OURS), result.find(PEER)
        if peer is None or result.time_ratio(peer) is None or result.time_ratio(ours) is None:
            continue
        faster = CaseResult.ratio_of(result.times(peer), result.times(ours)).median
        text = f"- {title(result)}: {faster:.1f} times as fast as {PEER}"
        mine, theirs = (largest_batch(side, record.memory_gib) for side in (ours, peer))
        if mine and theirs:
            text += f", the largest batch in {record.memory_gib:g} GiB is {mine:,} against {theirs:,} "
            text += f"({mine / theirs:.0f} times)"
        if result.case.model == "vgg19_cifar":
            text += f"; aimed at are {FASTER_THAN_PEER:g} and {LARGER_THAN_PEER:g} times"
        lines.append(text + (f" ({PEER}: {peer.fault})." if peer.fault else "."))
    return lines


def faults(record: Record) -> list[str]:
    """Sides with wrong gradients or none, a line each."""
    found: dict[str, list[str]] = {}
    for result in record.cases:
        for side in result.sides:
            if side.fault:
                found.setdefault(f"{side.name}: {side.fault}", []).append(title(result))
    return [f"- {fault} ({'; '.join(where)})" for fault, where in found.items()]


def markdown(record: Record, plot: str | None) -> str:
    """The report."""
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    lines = ["# Time and memory beside ordinary training", ""]
    lines += [f"Written by `{record.command}` on {record.date}.", ""]
    lines += [f"- Hardware: {record.hardware}."]
    lines += [f"- Versions: {versions}."]
    lines += [f"- Load average of the machine: {', '.join(f'{load:.1f}' for load in record.load)}.", "", METHOD, ""]
    lines += ["## One pass, as by default", "", *main_table(record), ""]
    if plot:
        lines += [f"![Time and memory ratios of all sides]({plot})", ""]
    if peers := against_peer(record):
        lines += ["## Beside Opacus, in the same run", "", *peers, ""]
    lines += section(record.cases, OURS, title, table)
    if wrong := faults(record):
        lines += ["## Wrong, or cannot run", "", *wrong, ""]
    lines += ["## Noise, once per logical batch", "", NOISE, ""]
    noise = [(title(r), f"{r.trained:,}", f"{r.noise_ratio():.3f}") for r in record.cases]
    lines += [*table(("model", "trained", "noise / non-private step"), noise), "", "## All sides", ""]
    for result in record.cases:
        lines += [f"### {title(result)}", "", *side_table(result, record.memory_gib), ""]
    return "\n".join(lines)


METHOD = """\
Ratios are to the non-private step (forward, loss, backward) of the same model with all parameters trained, without
optimizer and without noise; with raw parameters frozen they are frozen in that step too, because Opacus has no rule
for class tokens and positions. Weights and images are random, BatchNorm is replaced by GroupNorm on every side.

- Gradients: before timing, a step of each side on three examples is compared with a float32 loop over single examples,
  clipped at their middle norm. Shown is the relative error of the whole gradient; 1e-4 is allowed, to Opacus 1e-3. A
  side with wrong gradients is timed and marked; one that raises is not timed.
- Time: process CPU time (wall time on CUDA), all sides in one process, taking turns in rotating order. The ratio is
  taken round by round; shown are the median and in brackets the quartiles, then ("least") the shortest step over the
  shortest non-private one. A side far slower than the non-private step takes part in one round only.
- Memory: the most bytes allocated at once during a step beyond what was there when it began (parameters and images),
  from the profiler's record of every allocation (CUDA: the allocator's peak), in a step of its own, before timing.
- Largest batch: `(memory - parameters - a) / b` with the line `peak(n) = a + b n` through the peaks at the two largest
  of a half (if no larger one fits), one, two, four and eight batch sizes that need at most 4 GiB. An extrapolation."""

NOISE = """\
CPU time to draw and add Gaussian noise for all trained parameters, over the time of one non-private step at the batch
size of the table. It does not grow with the batch, and a logical batch of many such batches has it once."""


def write_summary(path: Path, record: Record, report: str) -> None:
    """Write the main table and the comparison with the peer between the markers of a Markdown file."""
    before, _, after = split_at_markers(path, BEGIN, END)
    note = f"{record.date}, {record.hardware}, torch {record.versions['torch']}. "
    note += (
        f"Time and memory are ratios to the same model's non-private step; all sides and how: [{report}]({report}). "
        f"Its section [{HEADING}]({report}#{HEADING.lower().replace(' ', '-')}) shows the least operations and bytes "
        "that a private step can do with, and where the time goes."
    )
    lines = [BEGIN, *main_table(record), "", *against_peer(record), "", note, END]
    path.write_text(before + "\n".join(lines) + after, encoding="utf-8")


def spread(values: Spread) -> str:
    """Median and, of several values, quartiles."""
    if values.count == 1:
        return f"{values.median:.2f}"
    return f"{values.median:.2f} ({values.low:.2f} to {values.high:.2f})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, *lines)]
    return [rows[0], "|" + " --- |" * len(head), *rows[1:]]


def own_faults(record: Record) -> list[tuple[str, SideResult]]:
    """Our sides, the non-private one included, that are wrong or cannot run."""
    return [(title(result), side) for result in record.cases for side in result.sides if side.ours and side.fault]
