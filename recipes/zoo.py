"""Every architecture of timm and every image classifier of transformers: are its clipped gradients exact?

    python recipes/zoo.py                           # what zoo.json and outputs/zoo.jsonl lack; then writes the reports
    python recipes/zoo.py --shard 2/4               # the second of four parts; results are appended, also by others
    python recipes/zoo.py --names resnet50 xcit_nano_12_p8_224 --results outputs/two.jsonl --no-report
    python recipes/zoo.py --report-only             # zoo.json, zoo.md and the README's section from the results

Each architecture is created in a small form (fewer blocks and narrower layers where its arguments allow, the smallest
image that it takes) with random weights, none of them zero, every parameter trainable, BatchNorm frozen. On two
random inputs in float64 the clipped gradients and norms of one backward pass are compared with a loop over single
examples. One is *refused* with the reason if training would refuse it; then it is measured whether its examples do
influence one another. One architecture of each module that has BatchNorm is checked with GroupNorm instead as well.

Architectures whose small forms are built from the same class with the same arguments are the same model and checked
once. A child process runs them, on one thread, with limits of time and memory, and is replaced when it ends; an
architecture that was answered before is skipped. A result counts for the versions of the libraries it was made with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from architectures import from_timm
from architectures.check import GROUP_NORM, NUM_CLASSES, Result, all_names, check, family
from architectures.reduction import Reduction
from architectures.report import versions, write
from architectures.supervise import Limits, checked


HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Check what is wanted and not yet answered, and write the reports."""
    args = _arguments(argv)
    if not args.report_only:
        wanted = list(queue(args.names or all_names(), *args.shard))
        _run(wanted, args.results, Limits(args.seconds, int(args.gibibytes * 2**30)), args.again)
    results = list(stored(args.results))
    if not results and not args.no_report:
        raise SystemExit(f"There is no result for {versions()}; those in zoo.json are left as they are.")
    if not args.no_report:
        write(results, all_names(), HERE, HERE.parent / "README.md")
    return results


def queue(names: Iterable[str], shard: int = 1, shards: int = 1) -> Iterator[str]:
    """One architecture of each family first, then the second of each, and so on; of these one part."""
    by_family: dict[str, list[str]] = {}
    for name in names:
        by_family.setdefault(family(name), []).append(name)
    ranked = [(rank, name) for own in by_family.values() for rank, name in enumerate(own)]
    ranked = [(0 if family(name) == "transformers" else rank, name) for rank, name in ranked]
    ordered = [name for _, name in sorted(ranked, key=lambda pair: pair[0])]
    yield from ordered[shard - 1 :: shards]


def stored(path: Path) -> Iterator[Result]:
    """The results made with the installed versions, by name: those committed, and newer ones in `path`."""
    known = {field.name for field in fields(Result)}
    found = committed()
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        if entry["versions"] == versions():
            found[entry["name"]] = entry
    for name in sorted(found):
        content = {key: value for key, value in found[name].items() if key in known}
        yield Result(**content | {"name": name, "generic": tuple(content.get("generic", ()))})


def committed() -> dict[str, dict[str, Any]]:
    """What `zoo.json` says by name, without what was not run; nothing where it was made with other versions."""
    path = HERE / "zoo.json"
    content = json.loads(path.read_text()) if path.exists() else {"versions": None}
    if content["versions"] != versions():
        return {}
    return {name: entry for name, entry in content["architectures"].items() if entry["status"] != "not run"}


def _run(names: list[str], path: Path, limits: Limits, again: bool) -> None:
    torch.set_num_threads(1)
    done = {} if again else {result.name: result for result in stored(path)}
    twins = Twins()
    for result in done.values():
        twins.learn(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with path.open("a") as file:
        for result in checked(_wanted(names, done, twins), _answer, limits):
            done[result.name] = result
            twins.learn(result)
            file.write(json.dumps({**asdict(result), "versions": versions()}) + "\n")
            file.flush()
            spent = time.monotonic() - started
            print(f"{len(done)} done, {spent:.0f} s, {result.name}: {result.status} {result.reason or ''}",
                  file=sys.stderr, flush=True)  # fmt: skip


class Twins:
    """Architectures of timm whose reduced forms are built from the same class with the same arguments."""

    def __init__(self) -> None:
        self._found: dict[str, Result] = {}

    def learn(self, result: Result) -> None:
        """Remember the model that was checked."""
        timm = result.family != "transformers" and not result.name.endswith(GROUP_NORM)
        if result.reduction and timm and not result.same_as:
            self._found.setdefault(self._first(result.name), result)

    def of(self, name: str) -> Result | None:
        """The result of the same model under another name."""
        known = self._found.get(self._first(name)) if family(name) != "transformers" else None
        if known is None:
            return None
        form = (Reduction(known.reduction), known.image_size, NUM_CLASSES)
        same = from_timm.fingerprint(name, *form) == from_timm.fingerprint(known.name, *form)
        return replace(known, name=name, family=family(name), same_as=known.name) if same else None

    @staticmethod
    def _first(name: str) -> str:
        """A text that equal models share; others may."""
        for image_size in from_timm.IMAGE_SIZES:
            try:
                return from_timm.fingerprint(name, Reduction.NARROW, image_size, NUM_CLASSES)
            except Exception:  # whatever an architecture raises where a size does not suit it
                continue
        return name


def _wanted(names: list[str], done: dict[str, Result], twins: Twins) -> Iterator[str | Result]:
    """Each architecture, then the first of each family with BatchNorm with GroupNorm; its result where it is known."""
    for name in names:
        if name not in done:
            yield twins.of(name) or name
    grouped = {family(name) for name in done if name.endswith(GROUP_NORM)}
    for name in names:
        if done[name].batchnorm and done[name].family not in grouped:
            grouped.add(done[name].family)
            yield name + GROUP_NORM


def _answer(name: str) -> Result:
    if name.endswith(GROUP_NORM):
        return check(name.removesuffix(GROUP_NORM), "group", name)
    return check(name)


def _shard(text: str) -> tuple[int, int]:
    shard, _, shards = text.partition("/")
    if not 1 <= int(shard) <= int(shards):
        raise ValueError(text)
    return int(shard), int(shards)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="*", help="these architectures only")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N parts")
    parser.add_argument("--results", type=Path, default=Path("outputs/zoo.jsonl"), help="one line per architecture")
    parser.add_argument("--seconds", type=float, default=90, help="most processor time per architecture")
    parser.add_argument("--gibibytes", type=float, default=8, help="most memory per architecture")
    parser.add_argument("--again", action="store_true", help="also what has been answered")
    parser.add_argument("--report-only", action="store_true", help="check nothing, write the reports")
    parser.add_argument("--no-report", action="store_true", help="write no reports")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
