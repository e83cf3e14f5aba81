"""The only place that knows matplotlib: empty figures, and how they are written. What is drawn, others decide."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ArgumentRefused


_INK = "#010203"  # stands for the colour of the text around a picture, which is not known when it is drawn
_AS_TEXT = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
# What a picture inside a page does not need, or may not have: its own style would be that of the whole page, and the
# same names stand in every picture.
_UNUSED = re.compile(r"<(metadata|title|style)\b.*?</\1>|<!--.*?-->| id=\"[a-z][\w.]*_\d+\"", re.DOTALL)
_FINE = re.compile(r"(\d\.\d\d)\d+")  # a hundredth of a point is finer than anyone sees


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def refuse_missing(what: str, extra: str, remedy: str) -> None:
    """Raise if matplotlib is not installed.

    Args:
        what: is to be drawn.
        extra: of this package that brings it.
        remedy: what to do instead.

    Raises:
        ArgumentRefused: matplotlib is missing.
    """
    if not available():
        raise ArgumentRefused(
            f"{what} is drawn by matplotlib, which is not installed. Install it with pip install "
            f"'hf_dpvision[{extra}]', or {remedy}."
        )


def figure(width: float, height: float, constrained: bool = True) -> Any:
    """Return an empty matplotlib figure of so many inches, which belongs to no window and to no global state.

    Args:
        width, height: in inches.
        constrained: whether margins are found by measuring what is drawn, which takes a second draw.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained" if constrained else None)


def save_png(picture: Any, path: Path) -> None:
    """Write a figure as PNG, without the name and version of the program, so that equal figures are equal files."""
    picture.savefig(path, dpi=110, format="png", metadata={"Software": None})


@contextmanager
def as_text_around() -> Iterator[None]:
    """Inside, axes and words are drawn for `inline_svg`, in the colour of the text that will be around them."""
    import matplotlib

    colours: dict[Any, str] = dict.fromkeys(_AS_TEXT, _INK)
    with matplotlib.rc_context(colours):
        yield


def inline_svg(picture: Any, name: str) -> str:
    """Return a figure, drawn inside `as_text_around`, as an `<svg>` element for a page that may be light or dark.

    Args:
        picture: the figure.
        name: read to whoever cannot see it; another one for every picture of a page, whose parts are named after it.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        picture.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = _FINE.sub(r"\1", _UNUSED.sub("", svg[svg.index("<svg") :])).replace(_INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1).strip()
