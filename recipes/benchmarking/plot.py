"""The picture of the measurements; needs matplotlib (extra `dev`)."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from .report import OURS, Record, title


COLOURS = {
    OURS: "tab:blue", "ours, two passes": "tab:cyan", "Opacus hooks": "tab:red", "Opacus ghost": "tab:orange",
}  # fmt: skip
HEIGHT = 0.8 / len(COLOURS)


def draw(record: Record, path: Path) -> None:
    """Write a PNG: bars of time and memory ratios by case, targets as black marks, wrong gradients hatched."""
    figure = Figure(figsize=(11, 1.5 + 0.75 * len(record.cases)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, label in zip(panels, ("time", "memory"), strict=True):
        for row, result in enumerate(record.cases):
            for place, (name, colour) in enumerate(COLOURS.items()):
                side = result.find(name)
                time = result.time_ratio(side) if side is not None else None
                if time is None:
                    continue
                value = time.median if label == "time" else result.memory_ratio(side)
                hatch = "////" if side.fault else None
                where = row + (place - 1.5) * HEIGHT
                panel.barh(where, value, HEIGHT, color=colour, hatch=hatch, edgecolor="white")
                panel.text(value, where, f" {value:.2f}", va="center", fontsize=7)
            if result.case.target is not None:
                goal = getattr(result.case.target, label)
                panel.plot([goal, goal], [row - 2.2 * HEIGHT, row - 0.8 * HEIGHT], color="black")
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16], ["0.25", "0.5", "1", "2", "4", "8", "16"])
        panel.minorticks_off()  # whose labels would lie on one another
        panel.set_xlabel(f"{label}, ratio to the non-private step")
        panel.margins(x=0.12)
    panels[0].set_yticks(range(len(record.cases)), [title(r).replace(", ", "\n", 1) for r in record.cases], fontsize=8)
    panels[0].invert_yaxis()
    handles = [panels[0].barh(0, 0, color=colour, label=name) for name, colour in COLOURS.items()]
    handles.append(
        panels[0].barh(0, 0, facecolor="lightgrey", hatch="////", edgecolor="white", label="wrong gradients")
    )
    handles += panels[0].plot([], [], color="black", label="target of ours, one pass")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.savefig(path, dpi=110)
