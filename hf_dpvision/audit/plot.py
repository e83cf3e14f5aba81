"""The picture of an audit; needs matplotlib (extra `audit`)."""

from __future__ import annotations

import math
from pathlib import Path

from .. import plots
from .inspection import Finding


def refuse_missing() -> None:
    """Raise if the extra is not installed.

    Raises:
        ArgumentRefused: matplotlib is missing.
    """
    plots.refuse_missing("The picture of an audit", "audit", "leave the picture out")


def draw(found: Finding, path: Path) -> None:
    """Write a PNG: how far the losses of canaries fell, in and out, and the bound by the number of guesses."""
    figure = plots.figure(10, 4)
    scores, bounds = figure.subplots(1, 2)
    groups = [found.scores[found.present], found.scores[~found.present]]
    labels = [f"in ({len(groups[0])})", f"zeroed out ({len(groups[1])})"]
    scores.hist(groups, bins=30, density=True, histtype="step", color=["tab:red", "tab:blue"], label=labels)
    scores.set(xlabel="fall of the loss by training", ylabel="density", title="Scores of the canaries")
    scores.legend()
    guesses = [one[0] for one in found.tries]
    bounds.plot(guesses, [one[2] for one in found.tries], "o-", color="black", label="lower bound")
    if math.isfinite(found.claimed):
        bounds.axhline(found.claimed, color="tab:red", linestyle="--", label=f"claimed, {found.claimed:.2f}")
    bounds.set(
        xlabel="guesses", ylabel=f"epsilon at delta = {found.delta:g}", ylim=(0, None), xscale="log",
        title=f"Epsilon, all bounds together with confidence {found.confidence:.0%}",
    )  # fmt: skip
    bounds.set_xticks(guesses, map(str, guesses))
    bounds.minorticks_off()  # whose labels would lie on one another
    bounds.legend()
    plots.save_png(figure, path)
