"""One difference between what is stated and what should be, and how two values are compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


_LONGEST = 100  # characters of a value that are shown


@dataclass(frozen=True)
class Finding:
    """What is wrong, and where.

    Args:
        where: the file, relative to the folder.
        field: path of the field, such as `noise.multiplier` or `events[0].steps`; of a card, the part.
        problem: what is stated, what was expected, and why.
    """

    where: str
    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.problem}" if self.field else f"{self.where}: {self.problem}"


def difference(where: str, field: str, stated: object, expected: object, why: str) -> Finding:
    """Return the finding that `field` has one value and should have the other."""
    return Finding(where, field, f"stated {shown(stated)}, expected {shown(expected)} ({why})")


def shown(value: object) -> str:
    """Return a value as JSON has it, shortened if it is long; floats keep all their digits."""
    if value is ...:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def differences(stated: object, expected: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield (path, stated, expected) of every leaf in which two nests of plain values differ; `...` means absent."""
    if isinstance(stated, Mapping) and isinstance(expected, Mapping):
        for key in [*expected, *(key for key in stated if key not in expected)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(stated.get(key, ...), expected.get(key, ...), inner)
    elif isinstance(stated, list) and isinstance(expected, list) and len(stated) == len(expected):
        for index, (one, other) in enumerate(zip(stated, expected, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif not _same(stated, expected):
        yield path, stated, expected


def as_plain_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a mapping; for parsers, which would otherwise let the last of two equal keys win.

    Raises:
        ValueError: a key is repeated.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        repeated = sorted({str(key) for key, _ in pairs if [k for k, _ in pairs].count(key) > 1})
        raise ValueError(f"{', '.join(repeated)} is stated twice")
    return content


def _same(stated: object, expected: object) -> bool:
    return stated == expected and isinstance(stated, bool) == isinstance(expected, bool)
