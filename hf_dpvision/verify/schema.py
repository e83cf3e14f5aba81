"""Read `privacy.json` and check its form against the schema that the package carries for its version."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from jsonschema import Draft202012Validator

from .findings import Finding, as_plain_mapping, shown


STATEMENT_FILE = "privacy.json"
SCHEMAS = {"1.1": "privacy-1.1.json", "1.2": "privacy-1.2.json", "1.3": "privacy-1.3.json"}


def read_statement(path: Path, where: str) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Return the statement, or None with what is wrong with its form; nothing else can be said of it then.

    Args:
        path: of the file.
        where: its name in the findings.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=as_plain_mapping, parse_constant=_not_json
        )
    except OSError:
        return None, [Finding(where, "", "missing: nothing is claimed for these weights, so nothing can be verified")]
    except ValueError as error:
        return None, [Finding(where, "", f"cannot be read as JSON ({error})")]
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in SCHEMAS:
        return None, [
            Finding(
                where,
                "schema_version",
                f"{shown(version)} is not known to this release, which reads {', '.join(SCHEMAS)}. What its fields "
                "mean cannot be guessed: verify it with the release of hf_dpvision that wrote it, or a newer one",
            )
        ]
    errors = sorted(_validator(version).iter_errors(content), key=lambda error: error.json_path)
    findings = [Finding(where, _field(error.json_path), f"{error.message} (schema {version})") for error in errors]
    return (None if findings else content), findings


def describe(version: str) -> dict[str, Any]:
    """Return the JSON Schema of a version in `SCHEMAS`."""
    return json.loads(files("hf_dpvision").joinpath("schemas", SCHEMAS[version]).read_text(encoding="utf-8"))


@cache
def _validator(version: str) -> Draft202012Validator:
    return Draft202012Validator(describe(version))


def _field(json_path: str) -> str:
    return json_path.removeprefix("$").removeprefix(".")


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
