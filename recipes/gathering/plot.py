"""The picture of the results: accuracy against epsilon, a panel for each data set; needs matplotlib (extra `dev`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .page import unique_series
from .points import Point, unique


def draw(points: Sequence[Point], path: Path) -> None:
    """Write a PNG: means with standard deviations, and the same without privacy at the right edge."""
    panels = unique(_data(point) for point in points)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.5 * columns, 4.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    targets = sorted({point.target for point in points if math.isfinite(point.target)})
    plain = 2 * targets[-1] if targets else 1.0
    for axes, data in zip(grid, panels, strict=False):
        mine = [point for point in points if _data(point) == data]
        for config, method in unique_series(mine):
            series = [point for point in mine if (point.config, point.method) == (config, method)]
            series.sort(key=lambda point: point.target)
            where = [min(point.target, plain) for point in series]
            bars = [100 * (point.spread or 0.0) for point in series]
            means = [100 * point.mean for point in series]
            label = f"{series[0].model.split('.')[0]}, {method}"
            axes.errorbar(where, means, bars, marker="o", capsize=3, label=label)
        axes.set_xscale("log")
        axes.set_xticks([*targets, plain], [*(f"{target:g}" for target in targets), "none"])
        axes.minorticks_off()
        axes.set_xlabel("epsilon; none: without privacy")
        axes.set_ylabel("accuracy on held-out images, %")
        axes.set_title(data, fontsize=10)
        axes.legend(fontsize=7)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def _data(point: Point) -> str:
    return point.data.split(",")[0]
