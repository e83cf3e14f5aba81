"""Which versions of the libraries the package works with: the whole test suite, in an environment made for each set.

    python recipes/versions.py                    # or: make matrix; both sets, an hour on two cores
    python recipes/versions.py oldest             # the floors of pyproject.toml, pinned in tests/versions/oldest.txt
    python recipes/versions.py newest --latest    # what pip takes within the bounds, and pins it in newest.txt
    python recipes/versions.py --report-only      # the tables of CONTRIBUTING.md and README.md, from the records

To widen the bounds: change them in `pyproject.toml`, and the pins of `oldest.txt` with the floors, run this, and read
`tests/test_versions.py`, which holds bounds, pins, records and tables to one another. The Python is the one that runs
this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hf_dpvision.results import split_at_markers


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "versions"
SETS = ("oldest", "newest")
LEFT_OUT = "tests/test_versions.py"  # it is about the record that a run here writes
COUNTS, NOT_RUN = ("passed", "failed", "skipped"), "not run"
BEGIN, END = "<!-- versions: written by recipes/versions.py, do not edit -->", "<!-- end of versions -->"
_NAMED = ("torch", "transformers", "timm", "datasets")  # in the README, the others in CONTRIBUTING.md alone
_ASK = (
    "import json, platform, sys; from importlib.metadata import version; "
    "print(json.dumps({'python': platform.python_version()} | {name: version(name) for name in sys.argv[1:]}))"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with each set of versions; write records and tables; return 1 if a test failed."""
    args = _arguments(argv)
    for name in () if args.report_only else args.sets:
        python = args.folder.absolute() / name / "bin" / "python"
        if not (args.keep and python.exists()):
            _make_environment(args.folder / name, None if args.latest else FOLDER / f"{name}.txt")
        if args.latest:
            pins = _installed(python, list(pinned(name)))
            (FOLDER / f"{name}.txt").write_text("".join(f"{one}=={pins[one]}\n" for one in pinned(name)))
        found = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "versions": _installed(python, list(pinned(name))),
            **tested(python, args.folder / f"{name}.xml", args.workers),
        }
        (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        if not args.keep:
            shutil.rmtree(args.folder / name)
    records = [record(name) for name in SETS]
    for path, text in ((ROOT / "CONTRIBUTING.md", table(*records)), (ROOT / "README.md", sentence(*records))):
        before, _, after = split_at_markers(path, BEGIN, END)
        path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return int(any(one["failed"] not in (0, NOT_RUN) for one in records))


def pinned(name: str) -> dict[str, str]:
    """The versions that `tests/versions/<name>.txt` pins."""
    lines = (FOLDER / f"{name}.txt").read_text().split()
    return dict(line.split("==") for line in lines)


def record(name: str) -> dict[str, Any]:
    """What came of the tests with a set of versions; its pins and "not run" until they have run."""
    path = FOLDER / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    return dict.fromkeys((*COUNTS, "date"), NOT_RUN) | {"versions": {"python": NOT_RUN} | pinned(name)}


def table(oldest: Mapping[str, Any], newest: Mapping[str, Any]) -> str:
    """What CONTRIBUTING.md says: the versions of both sets, and what came of the tests."""
    rows = [("tested with", "oldest", "newest"), ("---", "---", "---")]
    rows += [(name, oldest["versions"][name], newest["versions"][name]) for name in newest["versions"]]
    rows += [(key, str(oldest[key]), str(newest[key])) for key in (*COUNTS, "date")]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def sentence(oldest: Mapping[str, Any], newest: Mapping[str, Any]) -> str:
    """What the README says."""
    low, high = oldest["versions"], newest["versions"]
    spans = [f"{name} {low[name]}" + f" to {high[name]}" * (low[name] != high[name]) for name in _NAMED]
    passing = oldest["failed"] == newest["failed"] == 0
    said = "All tests pass at both ends of" if passing else "Not all tests have passed yet at both ends of"
    return f"{said} {', '.join(spans[:-1])} and {spans[-1]}."


def _make_environment(folder: Path, constraints: Path | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pins = [] if constraints is None else ["-c", str(constraints)]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, *pins, "-e", f"{ROOT}[test]"], check=True)


def _installed(python: Path, names: Sequence[str]) -> dict[str, str]:
    told = subprocess.run([str(python), "-c", _ASK, *names], capture_output=True, text=True, check=True)
    return {name: version.split("+")[0] for name, version in json.loads(told.stdout).items()}  # +cpu is the wheel's


def tested(python: Path, report: Path, workers: int, folder: Path = ROOT) -> dict[str, int]:
    """How many tests of the suite in `folder` passed, failed and were skipped."""
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-n", str(workers), f"--ignore={LEFT_OUT}"]
    subprocess.run([*command, f"--junitxml={report.absolute()}"], cwd=folder, check=False)
    suites = ElementTree.parse(report).getroot().findall("testsuite")
    counts = {key: sum(int(suite.get(key)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"], "failed": failed, "skipped": counts["skipped"],
    }  # fmt: skip


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", default=SETS, help=f"of {', '.join(SETS)}; by default both")
    parser.add_argument("--latest", action="store_true", help="install without pins, and write the pins anew")
    parser.add_argument("--folder", type=Path, default=Path("outputs/versions"), help="of the environments")
    parser.add_argument("--workers", type=int, default=2, help="test processes")
    parser.add_argument("--keep", action="store_true", help="use environments that are there, and leave them behind")
    parser.add_argument("--report-only", action="store_true", help="test nothing, write the tables")
    args = parser.parse_args(argv)
    if unknown := set(args.sets) - set(SETS):
        parser.error(f"{sorted(unknown)} is not among {SETS}")
    if args.latest and "oldest" in args.sets:
        parser.error("--latest is for the newest set; the oldest is what pyproject.toml says")
    return args


if __name__ == "__main__":
    sys.exit(main())
