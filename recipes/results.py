"""Write the table and the picture of all measured results from the records that the runs left.

    python recipes/results.py

A run of `finetune_image_classification.py` leaves its record with `--results_record recipes/results/NAME.jsonl`, one
of `linear_probe.py` or `scatter.py` with `--record`. Runs of one configuration and epsilon are averaged. The page is
`results.md` and the picture `results.png` beside this file; the README's first table is of the same numbers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from gathering.aims import verdicts
from gathering.page import headline, page
from gathering.points import read

from hf_dpvision.config import parse_arguments
from hf_dpvision.errors import DataRefused, RefusedError


HERE = Path(__file__).parent
BEGIN, END = "<!-- accuracies: written by recipes/results.py, do not edit -->", "<!-- end of accuracies -->"


@dataclass
class ResultsArguments:
    """Where the records are, and where the page goes."""

    records: str = field(default=str(HERE / "results"), metadata={"help": "Folder of records, *.jsonl."})
    page: str = field(default=str(HERE / "results.md"), metadata={"help": "Markdown file that is written."})
    summary: str = field(
        default=str(HERE.parent / "README.md"), metadata={"help": "File that quotes the best method of each."}
    )


def main(command_line: list[str]) -> str:
    """Run the recipe; see the top of this file. Returns the page."""
    parsed = parse_arguments([ResultsArguments], command_line, description=__doc__.split("\n\n")[0])
    (args,) = parsed.groups
    points, path = read(Path(args.records)), Path(args.page)
    if not points:
        raise DataRefused(f"there is no record of a run in {args.records!r}: give a recipe a place for its record.")
    picture = None
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed, so no picture is written: install the extra 'dev'")
    else:
        from gathering.plot import draw

        picture = path.with_suffix(".png").name
        draw(points, path.with_name(picture))
    text = page(points, verdicts(points), picture)
    path.write_text(text, encoding="utf-8")
    _quote(Path(args.summary), headline(points))
    print(f"{len(points)} points\n  page     {path}")
    return text


def _quote(path: Path, lines: list[str]) -> None:
    """Put the lines between the marks of a file."""
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise DataRefused(f"{str(path)!r} lacks the marks {BEGIN!r} and {END!r}: put them where the table belongs.")
    head, rest = text.split(BEGIN)
    path.write_text("\n".join([head + BEGIN, *lines, END + rest.split(END)[1]]), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RefusedError as refusal:
        sys.exit(f"{type(refusal).__name__}: {refusal}")
