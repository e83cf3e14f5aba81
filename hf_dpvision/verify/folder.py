"""Everything that is checked of one folder, and the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..accounting import Bounds
from ..accounting.journal import FILE, FOLDER, LOCK, History, Mark, read_journal
from ..errors import ArgumentRefused, LedgerRefused
from ..release import forbidden_files
from .card import compare_card, compare_report
from .consistency import inconsistencies
from .findings import Finding, difference
from .recompute import ACCOUNTANTS, recompute
from .schema import STATEMENT_FILE, read_statement


_WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        statement: the content of `privacy.json`; None if it could not be read.
        epsilons: epsilon of its events by each accountant that answered.
        notes: what could not be computed, and why.
        findings: every difference; the statement is verified if there is none.
        staying: files of a run's own folder that push_to_hub leaves out; of a released folder they are findings.
    """

    statement: Mapping[str, Any] | None
    epsilons: Mapping[str, Bounds] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    staying: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "verified": not self.findings,
            "stated": None if self.statement is None else self.statement["guarantee"],
            "recomputed": {name: bounds.to_dict() for name, bounds in self.epsilons.items()},
            "notes": list(self.notes),
            "findings": [asdict(finding) for finding in self.findings],
            "staying": list(self.staying),
        }


def verify_folder(
    folder: Path,
    accountants: Sequence[str] = tuple(ACCOUNTANTS),
    forbidden: Callable[[Path], Sequence[str]] = forbidden_files,
) -> Verification:
    """Check the folder of a released model: statement, epsilon, card, report, ledger, and that it holds no other file.

    Weights need not be there; they are not read. The output folder of a run, known by the lock of its ledger, may hold
    what stays there; that is noted, for whoever copies the folder instead of pushing it.

    Args:
        folder: what was, or is to be, released.
        accountants: who computes epsilon again, of `prv` and `pld`.
        forbidden: returns the files that may not be released, relative to the folder.

    Raises:
        ArgumentRefused: there is no such folder, or an accountant is not known.
    """
    check_accountants(accountants)
    if not folder.is_dir():
        raise ArgumentRefused(f"{str(folder)!r} is not a folder. Give the folder of a saved model, or a Hub id.")
    others, of_a_run = tuple(forbidden(folder)), (folder / FOLDER / LOCK).exists()
    staying = others if of_a_run else ()
    findings = [Finding(name, "", "may not be released") for name in others if not of_a_run]
    findings += _unstated_weights(folder)
    statement, flaws = read_statement(folder / STATEMENT_FILE, STATEMENT_FILE)
    if statement is None:
        return Verification(None, findings=(*flaws, *findings), staying=staying)
    again = recompute(statement, accountants, STATEMENT_FILE)
    if not any(finding.field == "events" for finding in again.findings):
        findings = [*inconsistencies(statement, STATEMENT_FILE), *findings]
        findings += [*compare_card(folder, statement), *compare_report(folder, statement)]
        findings += _ledger(folder, statement)
    findings = [*again.findings, *findings]
    return Verification(statement, again.bounds, again.notes, tuple(dict.fromkeys(findings)), staying)


def check_accountants(names: Sequence[str]) -> None:
    """Refuse names that are not accountants, and an empty list.

    Raises:
        ArgumentRefused: naming those that are.
    """
    unknown = [name for name in names if name not in ACCOUNTANTS]
    if unknown or not names:
        raise ArgumentRefused(f"accountants {list(names)}: choose from {', '.join(ACCOUNTANTS)}.")


def _unstated_weights(folder: Path) -> list[Finding]:
    """A file of weights in a folder of its own, such as a checkpoint, needs a statement of its own."""
    places = {path.parent for path in folder.rglob(_WEIGHTS)} - {folder}
    missing = sorted(place.relative_to(folder) for place in places if not _states(place, folder))
    return [
        Finding((place / STATEMENT_FILE).as_posix(), "", "missing: the weights beside it claim nothing")
        for place in missing
    ]


def _states(place: Path, folder: Path) -> bool:
    adapter = (place / "adapter_config.json").exists() and place.parent == folder
    return adapter or (place / STATEMENT_FILE).exists()  # a named adapter is a part of the model in `folder`


def _ledger(folder: Path, statement: Mapping[str, Any]) -> list[Finding]:
    """The ledger, where it was released too, must have gone through the state that the statement names."""
    where = f"{FOLDER}/{FILE}"
    try:
        history = read_journal(folder)
    except LedgerRefused as error:
        return [Finding(where, "", str(error))]
    if history is None or statement["ledger"] is None:
        return []
    mark = Mark(**statement["ledger"])
    if not history.contains(mark):
        return [Finding(STATEMENT_FILE, "ledger", f"{where} did not go through the state {json.dumps(asdict(mark))}")]
    charged = history.steps_before[mark.records - 1]
    if charged != statement["steps"]:
        return [difference(STATEMENT_FILE, "steps", statement["steps"], charged, f"charged in {where} up to ledger")]
    if differing := list(_search(statement["hyperparameter_tuning"], history, where)):
        return differing
    rows, named = statement["sampling"].get("rows", "indexed"), [f.get("rows", "indexed") for f in history.calls]
    if rows not in named:
        return [difference(STATEMENT_FILE, "sampling.rows", rows, named[-1], f"rows in {where}")]
    return [
        difference(STATEMENT_FILE, field, stated, facts.get(name), f"{name} in {where}")
        for facts in history.calls
        for field, stated, name in _unit(statement)
        if stated != facts.get(name)
    ]


def _search(tuning: Mapping[str, Any], history: History, where: str) -> Iterator[Finding]:
    """One run of a search with random stopping costs more than its steps, so that its ledger names the search."""
    stated, written = tuning.get("stopping"), (history.calls[-1].get("search") or {}).get("stopping")
    if stated != written:
        yield difference(STATEMENT_FILE, "hyperparameter_tuning.stopping", stated, written, f"search in {where}")
    runs, calls = tuning["runs_accounted"], len(history.calls)
    if runs is not None and runs > calls:
        why = f"calls of train() in {where}"
        yield difference(STATEMENT_FILE, "hyperparameter_tuning.runs_accounted", runs, calls, why)


def _unit(statement: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """Field, value, and name in the ledger, of what fixes the unit of privacy; of a ledger without groups None."""
    grouping = statement.get("grouping") or {}
    yield "unit_of_privacy", statement["unit_of_privacy"], "privacy_unit"
    yield "grouping.column", grouping.get("column"), "privacy_unit_column"
    yield "grouping.examples_per_unit", grouping.get("examples_per_unit"), "examples_per_unit"
