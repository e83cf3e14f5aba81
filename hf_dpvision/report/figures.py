"""The pictures of a report: one panel per question, alone as SVG for the page, together as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import plots
from ..accounting.claim import round_up
from ..wording import unit_of
from .facts import Points, RunFacts


# Readable on white and on black.
_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444")
_WIDTH, _HEIGHT = 5.2, 3.2  # inches of one panel


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: what it shows, in a few words.
        note: what a reader has to know, in a sentence or two.
        draw: draws it into matplotlib axes.
    """

    title: str
    note: str
    draw: Callable[[Any], None]


def panels(facts: RunFacts) -> list[Panel]:
    """Return the panels for which there is something to draw."""
    return [panel for panel in (_metrics(facts), _epsilon(facts), _gradients(facts), _rates(facts)) if panel]


def draw_svgs(facts: RunFacts) -> list[tuple[Panel, str]]:
    """Return every panel with its picture as an `<svg>` element."""
    drawn = []
    for panel in panels(facts):
        with plots.as_text_around():
            picture = plots.figure(_WIDTH, _HEIGHT, constrained=False)
            picture.subplots_adjust(left=0.15, right=0.97, bottom=0.17, top=0.95)
            panel.draw(picture.subplots())
            drawn.append((panel, plots.inline_svg(picture, panel.title)))
    return drawn


def draw_png(facts: RunFacts, path: Path) -> None:
    """Write all panels into one PNG, with the claim and its limits below: pictures are shown without their page."""
    shown = panels(facts)
    columns = min(2, len(shown)) or 1
    lines = math.ceil(len(shown) / columns)
    picture = plots.figure(columns * _WIDTH, lines * _HEIGHT + 0.9)
    for axes, panel in zip(picture.subplots(max(1, lines), columns, squeeze=False).flat, shown, strict=False):
        panel.draw(axes)
        axes.set_title(panel.title, fontsize=10)
    for axes in picture.axes[len(shown) :]:
        axes.set_axis_off()
    picture.supxlabel(caption(facts), fontsize=7.5, wrap=True)
    plots.save_png(picture, path)


def caption(facts: RunFacts) -> str:
    """Return what epsilon means and leaves out, in a few lines."""
    if not facts.protected:
        return "No privacy guarantee: epsilon is infinite. These curves may reveal training images. Do not release."
    guarantee, unit = facts.statement["guarantee"], unit_of(facts.statement)
    lines = [
        f"epsilon <= {round_up(guarantee['epsilon'], digits=3)} at delta = {guarantee['delta']:g} for {unit.short}",
        f"neighbours ({facts.statement['neighboring_relation']}): {unit.neighbour}",
        "not covered: pretraining data, searches over settings, evaluation data, other releases from the same images; "
        "all of it stands in privacy.json",
    ]
    if facts.private:
        lines.insert(0, "PRIVATE, not to be released: metrics on evaluation data that is not public")
    return "\n".join(lines)


def _metrics(facts: RunFacts) -> Panel | None:
    names = [name for name in facts.evaluations if not name.endswith("loss")] or list(facts.evaluations)
    if not names:
        return None

    def draw(axes: Any) -> None:
        for name, colour in zip(names, _COLOURS, strict=False):
            _line(axes, facts.evaluations[name], colour, name.replace("_", " "), marker="o")
        axes.set(xlabel="optimizer step", ylabel="value on evaluation data")
        axes.legend(framealpha=0)

    whose = "that is not public; epsilon does not cover them" if facts.private else "that was declared public"
    return Panel("Metrics on evaluation data", f"Measured on data {whose}. Step 0 is the model before training.", draw)


def _epsilon(facts: RunFacts) -> Panel | None:
    points = tuple((step, value) for step, value in facts.spending if math.isfinite(value))
    if len(points) < 2 or not facts.protected:
        return None

    def draw(axes: Any) -> None:
        _line(axes, points, _COLOURS[0], None, marker=".")
        axes.set(xlabel="charged steps", ylabel=f"epsilon at delta = {facts.statement['guarantee']['delta']:g}")
        axes.set_ylim(bottom=0)

    return Panel(
        "Epsilon spent",
        "The accountant's upper bound for the steps in the ledger, those that an interruption lost among them, for "
        f"{unit_of(facts.statement).short}.",
        draw,
    )


def _gradients(facts: RunFacts) -> Panel | None:
    if not facts.gradient_norms or not facts.protected:
        return None
    signals = facts.signal_norms

    def draw(axes: Any) -> None:
        _line(axes, facts.gradient_norms, _COLOURS[0], "released gradient", marker=".")
        if signals:
            _line(axes, signals, _COLOURS[2], "estimated without noise", marker=".", linestyle="")
        axes.axhline(facts.noise_norm, color=_COLOURS[1], linestyle="--", label="noise (root mean square)")
        highest = max(facts.noise_norm, *(value for _, value in facts.gradient_norms))
        axes.set(xlabel="optimizer step", ylabel="Euclidean norm", ylim=(0, 1.15 * highest))  # room above a flat line
        axes.legend(framealpha=0)

    ratio = facts.noise_to_signal
    said = (
        "The signal cannot be told from the noise."
        if ratio is None
        else f"Noise to signal, root mean square over the logged steps: {ratio:.3g}."
    )
    return Panel(
        "Noise and signal of the released gradients",
        f"{said} All of it follows from the noisy gradients that were released, and from the known size of their "
        "noise, sigma C sqrt(d) / B; no gradient without noise was looked at.",
        draw,
    )


def _rates(facts: RunFacts) -> Panel | None:
    if not facts.learning_rates:
        return None

    def draw(axes: Any) -> None:
        _line(axes, facts.learning_rates, _COLOURS[3], None, marker=".")
        axes.set(xlabel="optimizer step", ylabel="learning rate")
        axes.set_ylim(bottom=0)

    return Panel("Learning rate", "As the schedule set it.", draw)


def _line(axes: Any, points: Points, colour: str, label: str | None, **style: Any) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=colour, label=label, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
