"""Write the table and the picture of all measured results from the records that the runs left.

    python recipes/results.py

A run of `finetune_image_classification.py` leaves its record with `--results_record recipes/results/NAME.jsonl`, one
of `linear_probe.py` or `scatter.py` with `--record`. Runs of one configuration and epsilon are averaged. The page is
`results.md` and the picture `results.png` beside this file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from gathering.aims import verdicts
from gathering.page import page
from gathering.points import read

from hf_dpvision.config import parse_arguments
from hf_dpvision.errors import DataRefused, RefusedError


HERE = Path(__file__).parent


@dataclass
class ResultsArguments:
    """Where the records are, and where the page goes."""

    records: str = field(default=str(HERE / "results"), metadata={"help": "Folder of records, *.jsonl."})
    page: str = field(default=str(HERE / "results.md"), metadata={"help": "Markdown file that is written."})


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
    print(f"{len(points)} points\n  page     {path}")
    return text


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RefusedError as refusal:
        sys.exit(f"{type(refusal).__name__}: {refusal}")
