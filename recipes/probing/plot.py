"""Accuracy against epsilon, a line per method; needs matplotlib (extra `dev`)."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from .report import Record


COLOURS = ("tab:blue", "tab:orange", "tab:green")


def draw(record: Record, path: Path) -> None:
    """Write a PNG: means with standard deviations, and the same method without privacy dashed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, colour in zip(record.settings, COLOURS, strict=False):
        scores = [s for s in record.scores if s.method == method and not math.isinf(s.target)]
        points = [100 * score.mean for score in scores]
        bars = [100 * score.spread for score in scores]
        axes.errorbar([s.target for s in scores], points, bars, marker="o", capsize=3, color=colour, label=method)
        plain = record.find(method, math.inf)
        if plain is not None:
            axes.axhline(100 * plain.mean, color=colour, linestyle="--", linewidth=0.8)
    targets = sorted({s.target for s in record.scores if not math.isinf(s.target)})
    axes.set_xscale("log")
    axes.set_xticks(targets, [f"{target:g}" for target in targets])
    axes.minorticks_off()
    axes.set_xlabel(f"epsilon (delta = {record.delta:g}); dashed: without privacy")
    axes.set_ylabel("accuracy on held-out images, %")
    axes.set_title(f"{record.model}\n{record.data}", fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=110)
