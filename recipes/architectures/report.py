"""What was found of all architectures: `zoo.json`, `zoo.md` and a section of the README; no number typed by hand."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_dpvision.results import split_at_markers

from .check import GROUP_NORM, NUM_CLASSES, Result, family


BEGIN, END = "<!-- supported models: written by recipes/zoo.py, do not edit -->", "<!-- end of supported models -->"
STATUSES = ("exact", "refused", "wrong", "error", "too large", "unavailable", "not run")


def versions() -> dict[str, str]:
    """Of the libraries that decide a result."""
    return {name: version(name) for name in ("timm", "torch", "transformers")}


def content(results: Iterable[Result], names: Sequence[str]) -> dict[str, Any]:
    """What `zoo.json` holds: an entry for each of `names`, "not run" where there is no result."""
    found = {result.name: result for result in results}
    every = [*names, *sorted(name for name in found if name.endswith(GROUP_NORM))]
    entries = {name: _entry(found.get(name, Result(name, family(name), "not run"))) for name in sorted(every)}
    return {"versions": versions(), "classes": NUM_CLASSES, "architectures": entries}


def write(results: Iterable[Result], names: Sequence[str], folder: Path, readme: Path) -> None:
    """Write `zoo.json` and `zoo.md` into `folder` and the section of the README between its markers."""
    found = content(results, names)
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in found["architectures"].items())
    head = f'{{"versions": {json.dumps(found["versions"])}, "classes": {found["classes"]}, "architectures": {{\n'
    (folder / "zoo.json").write_text(head + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    (folder / "zoo.md").write_text(markdown(found), encoding="utf-8")
    before, _, after = split_at_markers(readme, BEGIN, END)
    readme.write_text(f"{before}{BEGIN}\n{summary(found)}\n{END}{after}", encoding="utf-8")


def _entry(result: Result) -> dict[str, Any]:
    entry: dict[str, Any] = {"family": result.family, "status": result.status}
    for key in ("reason", "parameters", "image_size", "reduction", "batchnorm", "generic", "same_as"):
        if value := getattr(result, key):
            entry[key] = value
    return entry


def summary(found: Mapping[str, Any]) -> str:
    """What the README says."""
    plain = {name: e for name, e in found["architectures"].items() if not name.endswith(GROUP_NORM)}
    of_timm = {name: e for name, e in plain.items() if e["family"] != "transformers"}
    of_transformers = {name: e for name, e in plain.items() if e["family"] == "transformers"}
    lines = ["| | architectures | " + " | ".join(STATUSES) + " |", "| --- " * (len(STATUSES) + 2) + "|"]
    for library, entries in (("timm", of_timm), ("transformers", of_transformers)):
        counts = Counter(entry["status"] for entry in entries.values())
        cells = [f"{library} {found['versions'][library]}", len(entries), *(counts[status] for status in STATUSES)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def markdown(found: Mapping[str, Any]) -> str:
    """The whole report."""
    entries = found["architectures"]
    plain = {name: entry for name, entry in entries.items() if not name.endswith(GROUP_NORM)}
    grouped = {name: entry for name, entry in entries.items() if name.endswith(GROUP_NORM)}
    made_with = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join([
        "# Every architecture of timm and every image classifier of transformers",
        "",
        "Written by `recipes/zoo.py`, whose docstring says how. Everything found, a line for each architecture:",
        f"[zoo.json](zoo.json). Made with {made_with}.",
        "",
        "- *exact*: norms and the clipped sum equal the loop over single examples, every parameter trained",
        "- *refused*: training refuses, for the reason given",
        "- *wrong*: they differ, though examples do not influence one another: a fault",
        "- *error*: the small model could not be built or run",
        "- *too large*: too many parameters, too slow or too large for the limits, in the smallest form found",
        "- *unavailable*: needs a package that is not installed",
        "",
        "Architectures whose small forms are built from the same class with the same arguments are one model, checked",
        f"once: {_different(plain)} different ones.",
        "",
        summary(found),
        "",
        f"BatchNorm is frozen. With GroupNorm instead, one architecture of each module: {_counted(grouped)}.",
        "",
        "## Reduced",
        "",
        f"{_counted(plain, 'reduction')}. An architecture is narrowed only where its arguments allow.",
        "",
        *_not_exact(entries),
        *_generic(plain),
        *_families(plain),
        "",
    ])  # fmt: skip


def _different(entries: Mapping[str, Mapping[str, Any]]) -> int:
    return sum("same_as" not in entry for entry in entries.values() if entry["status"] != "not run")


def _counted(entries: Mapping[str, Mapping[str, Any]], key: str = "status") -> str:
    counts = Counter(entry.get(key, "not built or not run") for entry in entries.values())
    return ", ".join(f"{count} {value}" for value, count in counts.most_common()) or "none"


def _not_exact(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["## What is not exact", ""]
    for status in STATUSES[1:-1]:
        reasons = defaultdict(list)
        for name, entry in entries.items():
            if entry["status"] == status:
                reasons[entry["reason"]].append(name)
        lines += [f"- {status}: {', '.join(f'`{n}`' for n in names)}: {reason}" for reason, names in reasons.items()]
    left = sum(entry["status"] == "not run" for entry in entries.values())
    return [*lines, f"- not run: {left}", ""]


def _generic(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    operations = defaultdict(list)
    for name, entry in entries.items():
        for operation in entry.get("generic", ()):
            operations[operation].append(name)
    lines = ["## Operations without a rule of their own", "", "Exact, but slow: one backward pass per example.", ""]
    for operation, names in sorted(operations.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(f"`{name}`" for name in names[:6]) + (", ..." if len(names) > 6 else "")
        lines.append(f"- `{operation}` in {len(names)}: {shown}")
    return [*lines, *(["- none"] if not operations else []), ""]


def _families(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    by_family = defaultdict(Counter)
    for entry in entries.values():
        by_family[entry["family"]][entry["status"]] += 1
    lines = ["## By module", "", "| module | architectures | found |", "| --- | --- | --- |"]
    for module, counts in sorted(by_family.items()):
        found = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        lines.append(f"| {module} | {counts.total()} | {found} |")
    return lines
