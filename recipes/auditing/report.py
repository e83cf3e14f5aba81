"""The report of the audits: a section each, replaced by the run that made it anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_dpvision.results import split_at_markers


TITLE = """# Audit

Written by `recipes/audit.py`, section by section; a section is written only if no correct run was contradicted and no
fault missed in it.

"""


def write(path: Path, section: str, lines: Sequence[str], run: str) -> None:
    """Put a section into the report, replacing an earlier one.

    Args:
        path: of the report; begun if it is not there.
        section: its name.
        lines: what it says.
        run: with what software and when it was made.
    """
    if not path.exists():
        path.write_text(TITLE, encoding="utf-8")
    begin, end = f"<!-- {section}: written by the run, do not edit -->", f"<!-- end of {section} -->"
    before, _, after = split_at_markers(path, begin, end)
    text = "\n".join([*lines, run])
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
