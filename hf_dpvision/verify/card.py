"""Compare card and report with `privacy.json`: front matter as values, words about privacy letter by letter."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..model_card import CARD_NAME, END_OF_BLOCK, PRIVACY_TAGS, privacy_blocks
from ..report import RELEASED_FILES, compared_parts
from ..wording import is_protected
from .findings import Finding, as_plain_mapping, difference, differences


KEY = "differential_privacy"
_FENCE = "---\n"


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        build = self.construct_object
        return as_plain_mapping([(build(key, True), build(value, True)) for key, value in node.value])


_StrictLoader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node))  # type: ignore[arg-type]


def compare_card(folder: Path, statement: Mapping[str, Any], where: str = CARD_NAME) -> list[Finding]:
    """Return every difference between the card in `folder` and the statement.

    Args:
        folder: that holds `README.md`.
        statement: valid by its schema.
        where: name of the card in the findings.
    """
    try:
        text = (folder / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return [Finding(where, "", "missing: whoever meets the model is not told what protects whom")]
    front, fence, body = text.removeprefix(_FENCE).partition(f"\n{_FENCE}")
    if not (text.startswith(_FENCE) and fence):
        return [Finding(where, KEY, "there is no front matter")]
    return [*_front_matter(front, statement, where), *_same_blocks(body, privacy_blocks(statement), statement, where)]


def compare_report(folder: Path, statement: Mapping[str, Any]) -> list[Finding]:
    """Return every difference between what the report says about privacy, if there is one, and the statement.

    Its curves cannot be checked: they are not in the statement.
    """
    where = RELEASED_FILES[0]
    try:
        text = (folder / where).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        return [Finding(where, "", f"cannot be read ({error})")]
    return list(_same_blocks(text, compared_parts(statement), statement, where))


def _front_matter(front: str, statement: Mapping[str, Any], where: str) -> Iterator[Finding]:
    try:
        content = yaml.load(front, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        yield Finding(where, "", f"the front matter cannot be read ({' '.join(str(error).split())})")
        return
    if not isinstance(content, dict) or not isinstance(content.get(KEY), dict):
        yield Finding(where, KEY, "missing from the front matter")
        return
    for path, stated, expected in differences(content[KEY], statement):
        yield difference(where, f"{KEY}.{path}", stated, expected, "privacy.json")
    claimed = [tag for tag in content.get("tags") or () if tag in PRIVACY_TAGS]
    if claimed and not is_protected(statement):
        yield difference(where, "tags", claimed, [], "nothing is guaranteed")


def _same_blocks(body: str, blocks: Sequence[str], statement: Mapping[str, Any], where: str) -> Iterator[Finding]:
    """Every block must stand there once, as it is rendered from the statement."""
    for block in blocks:
        start = block.partition("\n")[0]
        name = start.removeprefix("<!-- ").partition(":")[0]
        if body.count(start) != 1:
            yield Finding(where, name, f"{body.count(start)} such parts instead of one, marked by {start!r}")
            continue
        found = start + body.partition(start)[2].partition(END_OF_BLOCK)[0] + END_OF_BLOCK
        written_by = statement["software"].get("hf_dpvision")
        hint = "" if written_by == __version__ else f"; written by hf_dpvision {written_by}, whose words may be others"
        for stated, expected in _changed_lines(found, block):
            yield difference(where, name, stated, expected, f"rendered from privacy.json{hint}")


def _changed_lines(found: str, rendered: str) -> Iterator[tuple[object, object]]:
    one, other = found.split("\n"), rendered.split("\n")
    for kind, a, b, c, d in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if kind != "equal":
            for index in range(max(b - a, d - c)):
                yield one[a + index] if a + index < b else ..., other[c + index] if c + index < d else ...
