"""The page of results in Markdown; no number is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_dpvision.accounting.claim import round_up

from .aims import Verdict
from .points import Point, unique


HEAD = """# Measured results

Written by `recipes/results.py` from the records of the runs in [results](results), one line of JSON each. Accuracies
are on held-out images: mean and standard deviation of the runs, and their number. Epsilon is the upper bound of the
accountant named below. Unit of privacy: one training image. Neighbours: equal data sets but for one image that is
zeroed out; the number of images is public. Not covered: the held-out images, the data of the pretraining, the choice
of settings, and several runs on the same images, whose epsilons add up. "Poisson" means that every image takes part in
a step by its own secret draw, and that batches have no fixed size.
"""

SHOWN = (  # of the settings; all of them are in the configuration and the records
    "max_steps", "num_train_epochs", "logical_batch_size", "optim", "optim_args", "learning_rate", "lr_scheduler_type",
    "weight_decay", "per_sample_max_grad_norm", "clipping", "head_init", "replace_batchnorm", "train_transform",
)  # fmt: skip


def page(points: Sequence[Point], judged: Sequence[Verdict], plot: str | None) -> str:
    """Return the whole page: accuracies, aims, and how every number came about."""
    rows = unique_series(points)
    lines = [HEAD, "## Accuracy against epsilon", "", *accuracies(points, rows), ""]
    lines += [f"![accuracy against epsilon]({plot})", ""] if plot else []
    lines += ["## Aims", "", *aims(judged), "", "## Runs", ""]
    lines += [
        "The time is of one run, the held-out images included, on cores that others used as well. Sampling and noise "
        "come from",
        "the operating system and cannot be repeated; a seed decides the start of a new head and subsets only.",
        "",
    ]
    for config in unique(point.config for point in points):
        lines += section(config, [point for point in points if point.config == config])
    return "\n".join(lines)


def unique_series(points: Sequence[Point]) -> list[tuple[str, str]]:
    """Return configuration and method of all points, in order, without repeats."""
    return list(dict.fromkeys((point.config, point.method) for point in points))


def headline(points: Sequence[Point]) -> list[str]:
    """Of each configuration its best method: mean accuracies by epsilon.

    The best is the one whose highest mean is highest, without regard to epsilon: on features that is one of several
    heads, all of which the page has.
    """
    best = {}
    for point in sorted(points, key=lambda point: point.mean):
        best[point.config] = point.method
    rows = [series for series in unique_series(points) if best[series[0]] == series[1]]
    shown = [point for point in points if (point.config, point.method) in rows]
    targets = sorted({point.target for point in shown})
    lines = _head(["data", "model", "trained", *(_target(shown, target) for target in targets)])
    for config, method in rows:
        mine = {point.target: point for point in shown if point.config == config}
        first = next(iter(mine.values()))
        cells = [f"{100 * mine[target].mean:.1f} %" if target in mine else "" for target in targets]
        lines.append(_row([first.data, first.model, _trained(method), *cells]))
    return lines


def _trained(method: str) -> str:
    return "linear head, on cached features" if method == "gradient descent" else method


def accuracies(points: Sequence[Point], rows: Sequence[tuple[str, str]]) -> list[str]:
    """One row per configuration and method, one column per epsilon."""
    targets = sorted({point.target for point in points})
    lines = _head(["data", "model", "method", *(_target(points, target) for target in targets)])
    for config, method in rows:
        mine = {point.target: point for point in points if (point.config, point.method) == (config, method)}
        first = next(iter(mine.values()))
        lines.append(_row([first.data, first.model, method, *(_accuracy(mine.get(target)) for target in targets)]))
    return lines


def aims(judged: Sequence[Verdict]) -> list[str]:
    """One row per aim."""
    lines = _head(["aim", "epsilon", "needed", "reached", "outcome"])
    for verdict in judged:
        aim, met = verdict.aim, verdict.met
        outcome = aim.why_not if met is None else "met" if met else "missed"
        above = ">=" if aim.within else ">"
        needed = "unknown" if verdict.needed is None else f"{above} {100 * verdict.needed:.2f} %"
        reached = "not run"
        if verdict.reached is not None:
            reached = f"{_accuracy(verdict.reached, digits=2)}, {verdict.reached.method}"
        lines.append(_row([aim.what, f"{aim.at:g}", needed, reached, outcome]))
    return lines


def section(config: str, points: Sequence[Point]) -> list[str]:
    """How the numbers of one configuration came about."""
    lines = [f"### {config}", "", f"{points[0].model} on {points[0].data}.", ""]
    lines += _head(["method", "epsilon", "runs", "what a run was charged", "accountant", "time of a run"])
    for point in sorted(points, key=lambda point: (point.method, point.target)):
        seeds = f", {_numbers(point.seeds)}" if point.seeds else ", no seed"
        times = _duration(point.seconds) + (", both models" if point.compared else "")
        cells = [point.method, _epsilon(point), f"{len(point.accuracies)}{seeds}", _charged(point), point.accountant]
        lines.append(_row([*cells, times]))
    lines += ["", *unique(f"- {point.method}: {_settings(point)}." for point in points)]
    commands = unique(command for point in points for command in point.commands)
    lines += ["", "Commands, of the first and of the last run:" if len(commands) > 1 else "Command:", ""]
    lines += [f"    {command}" for command in unique([commands[0], commands[-1]])]
    where = unique(text for point in points for text in point.hardware)
    what = unique(text for point in points for text in point.versions)
    when = sorted(unique(text for point in points for text in point.dates))
    lines += ["", f"{'; '.join(where)}. {'; '.join(what)}. {', '.join(when)}.", ""]
    for note in unique(note for point in points for note in point.notes):
        lines += [note, ""]
    return lines


def _head(titles: Sequence[str]) -> list[str]:
    return [_row(titles), "|" + " --- |" * len(titles)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _target(points: Sequence[Point], target: float) -> str:
    if math.isinf(target):
        return "non-private"
    return f"epsilon <= {round_up(max(point.upper for point in points if point.target == target), digits=2)}"


def _epsilon(point: Point) -> str:
    if math.isinf(point.target):
        return "none"
    return f"<= {round_up(point.upper, digits=4)}, delta = {point.delta:g}"


def _accuracy(point: Point | None, digits: int = 1) -> str:
    if point is None:
        return "not run"
    spread = "" if point.spread is None else f" ± {100 * point.spread:.{digits}f}"
    return f"{100 * point.mean:.{digits}f}{spread} % ({len(point.accuracies)})"


def _charged(point: Point) -> str:
    if not point.events:
        return "nothing"
    return "; then ".join(
        f"{event['steps']} x noise multiplier {event['noise_multiplier']:.4g}, "
        + ("everyone" if event["sample_rate"] == 1 else f"Poisson with rate {event['sample_rate']:.4g}")
        for event in point.events
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _settings(point: Point) -> str:
    if "told" in point.settings:
        return str(point.settings["told"])
    return ", ".join(f"{name} {point.settings[name]}" for name in SHOWN if name in point.settings)


def _numbers(seeds: Sequence[int]) -> str:
    ordered = sorted(set(seeds))
    whole = ordered == list(range(ordered[0], ordered[-1] + 1)) and len(ordered) > 2
    numbers = f"{ordered[0]} to {ordered[-1]}" if whole else ", ".join(map(str, ordered))
    return f"seed{'s' if len(ordered) > 1 else ''} {numbers}"
