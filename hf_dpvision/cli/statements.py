"""`hf-dpvision verify` and `hf-dpvision statement`: is a released model's statement true, and what does it say."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import AccountingError
from .commands import Answer, add_command


if TYPE_CHECKING:
    from ..verify import Verification

_VERIFY_HELP = """\
Check the privacy statement of a released model. Epsilon is computed again from privacy.json with two independent
accountants (prv-accountant, dp-accounting), every field is compared with the others and with the model card, and files
that may not be released are named. Weights are not read, and of a model on the Hub not fetched. Exit code 1 on any
difference; each is named by its field, with both values.

examples:
  hf-dpvision verify model_cards/digits_beit
  hf-dpvision verify owner/name --json
  hf-dpvision verify model_cards/digits_beit --accountants prv
"""
_STATEMENT_HELP = """\
The privacy statement of a released model in plain language. It is shown as it stands in privacy.json; whether it is
true says the command verify.

examples:
  hf-dpvision statement model_cards/digits_beit
  hf-dpvision statement owner/name
"""


def register(commands: Any) -> None:
    """Add both commands."""
    verify = add_command(commands, "verify", _VERIFY_HELP, _verify, "computing epsilon again")
    verify.add_argument("model", help="folder of a released model, or its Hub id")
    verify.add_argument(
        "--accountants",
        default="prv,pld",
        metavar="NAMES",
        help="who computes epsilon again (default %(default)s; pld needs the extra `verify`)",
    )
    statement = add_command(commands, "statement", _STATEMENT_HELP, _statement, "reading the statement")
    statement.add_argument("model", help="folder of a released model, or its Hub id")


def _verify(arguments: argparse.Namespace) -> Answer:
    from ..verify import fetched, verify_folder  # here, so that --help does not load the accountants

    with fetched(arguments.model) as folder:
        result = verify_folder(folder, [name for name in arguments.accountants.split(",") if name])
    return Answer(result.to_dict(), _told(result), 1 if result.findings else 0)


def _told(result: Verification) -> str:
    from ..accounting.claim import round_down, round_up

    lines = [] if result.statement is None else [_stated(result.statement)]
    claims = result.statement is not None and result.statement["guarantee"]["epsilon"] != "inf"
    for name, bounds in result.epsilons.items() if claims else ():
        lower = f"{round_down(bounds.lower)} to " if bounds.lower else "at most "
        lines.append(f"  {name:<9} {lower}{round_up(bounds.upper)}")
    lines += [f"  note: {note}" for note in result.notes]
    if result.staying:
        lines.append(f"  note: this is a run's own folder; push_to_hub leaves out {', '.join(result.staying)}")
    if not result.findings:
        others = "" if result.staying else ", and no other file lies there"
        return "\n".join([*lines, f"Verified: statement, accountants and card agree{others}."])
    count = len(result.findings)
    verdict = f"NOT verified: {count} difference{'' if count == 1 else 's'}."
    return "\n".join([*lines, verdict, *(f"  {finding}" for finding in result.findings)])


def _stated(statement: Mapping[str, Any]) -> str:
    guarantee = statement["guarantee"]
    if guarantee["epsilon"] == "inf":
        return "Stated: no privacy, epsilon is infinite."
    from ..wording import unit_of

    return (
        f"Stated: epsilon <= {guarantee['epsilon']} at delta {guarantee['delta']:g}, for "
        f"{unit_of(statement).short}. Computed again:"
    )


def _statement(arguments: argparse.Namespace) -> Answer:
    from ..verify import fetched
    from ..verify.schema import STATEMENT_FILE, read_statement
    from ..wording import plain_statement

    with fetched(arguments.model) as folder:
        statement, findings = read_statement(folder / STATEMENT_FILE, STATEMENT_FILE)
    if statement is None:
        raise AccountingError("; ".join(map(str, findings)))
    return Answer(statement, plain_statement(statement))
