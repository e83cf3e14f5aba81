"""The page of a report: one HTML file that needs no network, no script, and no other file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..model_card import END_OF_BLOCK
from ..wording import is_protected, plain_sentences, rows, unit_of
from .facts import Points, RunFacts
from .figures import Panel


_MARK = "<!-- privacy report: rendered from privacy.json and compared by hf-dpvision verify, do not edit -->"


def render_page(facts: RunFacts, name: str, pictures: list[tuple[Panel, str]]) -> str:
    """Return the page.

    Args:
        facts: what is shown.
        name: of the model.
        pictures: the panels, each with its `<svg>` element.
    """
    return _environment().get_template("report.html.jinja").render(
        facts=facts,
        name=name,
        pictures=pictures,
        privacy=_privacy(facts.statement),
        steps=_table(facts),
    )


def compared_parts(statement: Mapping[str, Any]) -> list[str]:
    """Return the part of the page that speaks of privacy, between two comments; it depends on the statement alone."""
    return [_privacy(statement)]


def _privacy(statement: Mapping[str, Any]) -> str:
    protected = is_protected(statement)
    text = _environment().get_template("report_privacy.html.jinja").render(
        protected=protected,
        paragraphs=plain_sentences(statement),
        rows=rows(statement) if protected else [],
        covered=unit_of(statement).covered,
        statement=statement,
    )
    return f"{_MARK}\n{text.strip()}\n{END_OF_BLOCK}"


def _table(facts: RunFacts) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of everything that is drawn by step."""
    columns: dict[str, Points] = {
        "epsilon (charged steps)": facts.spending,
        "learning rate": facts.learning_rates,
        "norm of the released gradient": facts.gradient_norms,
    } | {name.replace("_", " "): points for name, points in facts.evaluations.items()}
    columns = {name: points for name, points in columns.items() if points}
    by_step = {name: dict(points) for name, points in columns.items()}
    steps = sorted({step for points in by_step.values() for step in points})
    cells = [[str(step), *(_cell(by_step[name].get(step)) for name in columns)] for step in steps]
    return ["step", *columns], cells


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("hf_dpvision", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
