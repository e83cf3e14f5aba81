"""The files of a report. Their names decide what may leave: what is named `report` is covered, whatever run it was."""

from __future__ import annotations

from pathlib import Path

from .facts import RunFacts
from .figures import draw_png, draw_svgs
from .page import render_page


RELEASED_FILES = ("report.html", "report.png")
PRIVATE_FILES = ("report-private.html", "report-private.png")


def write_report(folder: Path, name: str, released: RunFacts | None, private: RunFacts | None) -> list[Path]:
    """Write what may leave and what has to stay, each as page and picture; return the files.

    Files of an earlier report, of which there is nothing now, are removed.

    Args:
        folder: made if it does not exist.
        name: of the model.
        released: what may leave; None if nothing may.
        private: what has to stay; None if all of it may leave.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for facts, names in ((released, RELEASED_FILES), (private, PRIVATE_FILES)):
        page, picture = (folder / file for file in names)
        if facts is None:
            page.unlink(missing_ok=True)
            picture.unlink(missing_ok=True)
            continue
        page.write_text(render_page(facts, name, draw_svgs(facts)), encoding="utf-8")
        draw_png(facts, picture)
        written += [page, picture]
    return written
