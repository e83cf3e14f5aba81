"""`privacy.json` has the form that its schema describes, says what was trained, and reads as plain words."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator
from torch import nn
from trainer_cases import Linear, trainer

from hf_dpvision import cli
from hf_dpvision.statement import SCHEMA_VERSION, STATEMENT_FILE, write_statement
from hf_dpvision.verify import schema
from hf_dpvision.wording import plain_statement


def _fields(description: dict, path: str = ""):
    for name, content in description.get("properties", {}).items():
        yield f"{path}{name}", content
        yield from _fields(content, f"{path}{name}.")
        yield from _fields(content.get("items", {}), f"{path}{name}[].")


def test_the_schema_is_a_schema_and_describes_every_field():
    description = schema.describe(SCHEMA_VERSION)
    Draft202012Validator.check_schema(description)
    fields = dict(_fields(description))
    assert len(fields) > 60 and all(content["description"] for content in fields.values())
    assert description["additionalProperties"] is False and set(description["required"]) == set(
        description["properties"]
    )


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"seed": None}, 4),
        ({"seed": None, "clipping": "automatic", "backward_passes": 2, "norm_rule": "ghost"}, 4),
        ({"seed": None, "accountant": "rdp", "eval_data": "public", "train_data_name": "owner/images"}, 4),
        ({"seed": None, "logical_batch_size": 64}, 4),  # every example in every step: closed form
        ({"seed": None, "disable_dp": True}, 4),
        ({"seed": 0}, 4),
        ({"seed": None}, 0),
    ],
)
def test_every_kind_of_run_states_itself_in_the_form_of_the_schema(tmp_path, changes, steps):
    run = trainer(tmp_path, Linear(), **changes)
    if steps:
        run.train()
    path = write_statement(tmp_path, run.privacy_statement())
    statement, findings = schema.read_statement(path, path.name)
    assert findings == [] and statement == run.privacy_statement()
    assert statement["steps"] == (0 if changes.get("disable_dp") else steps)


def test_what_was_trained_is_named_block_by_block(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model[0].requires_grad_(False)
    said = trainer(tmp_path, model, seed=None).privacy_statement()["trainable_parameters"]
    assert said["frozen_tensors"] == {"*.weight": 1, "*.bias": 1}
    assert said["trained_tensors"] == {"*.*.weight": 2, "*.*.bias": 2}
    assert (said["trained"], said["frozen"]) == (40, 20)


@pytest.mark.parametrize("version", ["1.0", "2.0", None, 1.1])
def test_another_version_is_refused_and_not_guessed_at(tmp_path, version):
    statement = trainer(tmp_path, Linear(), seed=None).privacy_statement() | {"schema_version": version}
    read, findings = schema.read_statement(write_statement(tmp_path, statement), STATEMENT_FILE)
    assert read is None and [finding.field for finding in findings] == ["schema_version"]
    assert "not known to this release, which reads 1.1" in findings[0].problem


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read"), ('{"steps": 1, "steps": 2}', "steps is stated twice"), ('{"a": NaN}', "NaN is no JSON")],
)
def test_a_file_that_is_not_plain_json_is_refused(tmp_path, text, words):
    (tmp_path / STATEMENT_FILE).write_text(text)
    read, findings = schema.read_statement(tmp_path / STATEMENT_FILE, STATEMENT_FILE)
    assert read is None and words in findings[0].problem


def test_a_missing_an_added_and_a_mistyped_field_are_named(tmp_path):
    statement = trainer(tmp_path, Linear(), seed=None).privacy_statement()
    del statement["noise"]["std"]
    statement["clipping"]["bound"] = "1.0"
    statement["sampling"]["shuffled"] = True
    _, findings = schema.read_statement(write_statement(tmp_path, statement), STATEMENT_FILE)
    told = [str(finding) for finding in findings]
    assert any("noise" in one and "'std' is a required property" in one for one in told)
    assert any("clipping.bound" in one for one in told) and any("'shuffled' was unexpected" in one for one in told)


def test_the_plain_statement_has_the_numbers_and_both_lists(tmp_path, capsys):
    run = trainer(tmp_path, Linear(), seed=None)
    run.train()
    run.save_model()
    capsys.readouterr()
    assert cli.main(["statement", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    said = run.privacy_statement()
    assert text == plain_statement(said) + "\n"
    for part in ("In plain words", "epsilon at most", "steps T", "zero-out", "no central-limit value", "Protected:"):
        assert part in text, part
    assert all(sentence in text for sentence in said["not_covered"])
    assert cli.main(["statement", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == said


def test_the_plain_statement_of_an_unprotected_model_says_so(tmp_path, capsys):
    run = trainer(tmp_path, Linear(), seed=None, disable_dp=True)
    run.train()
    run.save_model()
    assert cli.main(["statement", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "without a privacy guarantee" in text and "epsilon is infinite" in text and "Protected:" not in text


def test_a_folder_without_a_statement_ends_with_code_1(tmp_path, capsys):
    assert cli.main(["statement", str(tmp_path)]) == 1
    assert "privacy.json: missing" in capsys.readouterr().err
    assert cli.main(["statement", str(tmp_path / "absent")]) == 2
