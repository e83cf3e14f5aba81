"""A released folder is verified as it is, and no number of its statement can be changed without being named."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from trainer_cases import Linear, trainer

from hf_dpvision import cli, verify
from hf_dpvision.accounting import pld
from hf_dpvision.errors import ArgumentRefused, DPVisionError
from hf_dpvision.model_card import write_model_card
from hf_dpvision.statement import write_statement
from hf_dpvision.verify.findings import differences


CARDS = Path(__file__).resolve().parents[1] / "model_cards"
HONEST = CARDS / "digits_beit"
needs_pld = pytest.mark.skipif(not pld.available(), reason="dp-accounting is not installed (extra `verify`)")


def statement_of(folder: Path) -> dict:
    return json.loads((folder / "privacy.json").read_text())


def numbers(content: object, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all numbers in a nest of plain values."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from numbers(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from numbers(value, (*path, index))
    elif isinstance(content, (int, float)) and not isinstance(content, bool):
        yield path


def shown(path: tuple) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def changed(content: dict, path: tuple, digit: int = 0) -> dict:
    """A copy in which one digit of the number at `path` is another one: the first digit that is not 0, or a later."""
    content = copy.deepcopy(content)
    *outer, last = path
    place = content
    for part in outer:
        place = place[part]
    text = repr(place[last])
    digits = [index for index, letter in enumerate(text.partition("e")[0]) if letter.isdigit()]
    digits = digits[next((i for i, index in enumerate(digits) if text[index] != "0"), 0) :]
    index = digits[min(digit, len(digits) - 1)]
    place[last] = type(place[last])(text[:index] + ("3" if text[index] != "3" else "4") + text[index + 1 :])
    return content


def released(folder: Path, statement: dict, card: bool = True) -> Path:
    """Write statement and card as a run does."""
    write_statement(folder, statement)
    if card:
        write_model_card(folder, statement, model_name="tiny")
    return folder


def findings(folder: Path, accountants: tuple[str, ...] = ("prv",)) -> list[verify.Finding]:
    return list(verify.verify_folder(folder, accountants).findings)


FIELDS = [shown(path) for path in numbers(statement_of(HONEST))]
PATHS = dict(zip(FIELDS, numbers(statement_of(HONEST)), strict=True))
# No other field follows from these, and no accountant reads them: the card alone shows that they were changed.
FREE = {"trainable_parameters.trained", "trainable_parameters.frozen", "clipping.backward_passes", "ledger.records"}
FREE |= {field for field in FIELDS if "_tensors." in field}
# These are wrong together with others: whoever reads the statement sees which number does not follow from the rest.
NAMED = {
    "events[0].sample_rate": {"guarantee.epsilon", "sampling.rate"},
    "events[0].noise_multiplier": {"guarantee.epsilon", "noise.multiplier"},
    "events[0].steps": {"guarantee.epsilon", "steps"},
    "sampling.expected_batch_size": {"sampling.rate"},
    "sampling.dataset_size": {"sampling.rate"},
    "clipping.bound": {"clipping.sensitivity"},
    "guarantee.delta": {"guarantee.epsilon"},
}


@needs_pld
@pytest.mark.parametrize("name", sorted(path.parent.name for path in CARDS.glob("*/privacy.json")))
def test_every_published_card_is_verified(name, capsys):
    assert cli.main(["verify", str(CARDS / name)]) == 0
    out = capsys.readouterr().out
    assert "Verified" in out and "prv" in out and "pld" in out and "rdp" in out


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("digit", [0, 2])
def test_a_changed_digit_of_the_statement_is_named(tmp_path, field, digit):
    folder = shutil.copytree(HONEST, tmp_path / "model")
    write_statement(folder, changed(statement_of(HONEST), PATHS[field], digit))
    named = {finding.field for finding in findings(folder)}
    assert f"differential_privacy.{field}" in named or field in named


@pytest.mark.parametrize("field", [field for field in FIELDS if field not in FREE])
def test_a_changed_number_is_found_even_if_the_card_was_rewritten_from_it(tmp_path, field):
    folder = released(tmp_path, changed(statement_of(HONEST), PATHS[field]))
    named = {finding.field for finding in findings(folder)}
    assert named & ({field} | NAMED.get(field, set())), named


@pytest.mark.parametrize("field", ["noise.multiplier", "steps", "guarantee.epsilon"])
def test_a_changed_digit_of_the_card_is_named(tmp_path, field, capsys):
    folder = shutil.copytree(HONEST, tmp_path / "model")
    write_model_card(folder, changed(statement_of(HONEST), PATHS[field], 1), model_name="digits_beit")
    assert cli.main(["verify", str(folder), "--accountants", "prv"]) == 1
    out = capsys.readouterr().out
    assert f"README.md: differential_privacy.{field}: stated " in out and "NOT verified" in out


@pytest.mark.parametrize(
    ("old", "new"),
    [("epsilon at most 2", "epsilon at most 1"), ("| steps T | 50 |", "| steps T | 40 |"), ("- Several i", "- Two i")],
)
def test_changed_words_about_privacy_are_named(tmp_path, old, new):
    folder = shutil.copytree(HONEST, tmp_path / "model")
    card = folder / "README.md"
    assert card.read_text().count(old) == 1
    card.write_text(card.read_text().replace(old, new))
    assert [finding.field for finding in findings(folder)] in (["privacy summary"], ["privacy details"])
    card.write_text(card.read_text().replace("<!-- privacy", "<!-- other"))
    assert {finding.field for finding in findings(folder)} == {"privacy summary", "privacy details"}


def test_the_rest_of_the_card_is_the_authors(tmp_path):
    folder = shutil.copytree(HONEST, tmp_path / "model")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license:", "licence:").replace("## Training", "## How it was trained"))
    assert findings(folder) == []


def test_everything_changed_consistently_is_found_by_the_accountant(tmp_path):
    statement = statement_of(HONEST)
    for path in (("noise", "multiplier"), ("noise", "std"), ("events", 0, "noise_multiplier")):
        statement = changed(statement, path)
    found = findings(released(tmp_path, statement))
    assert {"guarantee.epsilon", "accountant.upper", "guarantee.gdp.mu"} <= {one.field for one in found}


def test_a_statement_that_claims_too_little_loss_contradicts_certified_bounds(tmp_path):
    statement = statement_of(HONEST)
    statement["guarantee"]["epsilon"] = 1.5
    problems = [one.problem for one in findings(released(tmp_path, statement)) if one.field == "guarantee.epsilon"]
    assert any("prv certifies that it is at least" in problem for problem in problems)


@needs_pld
def test_the_second_accountant_alone_finds_it_too(tmp_path):
    statement = statement_of(HONEST)
    statement["guarantee"]["epsilon"] = 1.5
    result = verify.verify_folder(released(tmp_path, statement), ("pld",))
    assert any("pld certifies that it is at least" in one.problem for one in result.findings)
    assert set(result.epsilons) == {"pld", "rdp"}


def test_without_the_second_accountant_nothing_is_verified(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pld, "available", lambda: False)
    assert cli.main(["verify", str(HONEST)]) == 1
    out = capsys.readouterr().out
    assert "not checked by a second accountant" in out and "hf_dpvision[verify]" in out
    assert cli.main(["verify", str(HONEST), "--accountants", "prv"]) == 0


def test_a_forbidden_file_and_weights_without_a_statement_are_named(tmp_path, capsys):
    folder = shutil.copytree(HONEST, tmp_path / "model")
    (folder / "model.safetensors").touch()
    assert findings(folder) == []
    (folder / "training_args.bin").touch()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").touch()
    assert cli.main(["verify", str(folder), "--accountants", "prv", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] is False
    assert {"training_args.bin", "checkpoint-5/privacy.json"} <= {one["where"] for one in report["findings"]}


def test_a_missing_card_or_statement_is_named(tmp_path):
    folder = shutil.copytree(HONEST, tmp_path / "model")
    (folder / "README.md").unlink()
    assert [str(one).partition(":")[0] for one in findings(folder)] == ["README.md"]
    (folder / "privacy.json").unlink()
    assert [str(one).partition(":")[0] for one in findings(folder)] == ["privacy.json"]


def test_a_key_stated_twice_in_the_card_is_refused(tmp_path):
    folder = shutil.copytree(HONEST, tmp_path / "model")
    card = folder / "README.md"
    key = "differential_privacy:\n"
    card.write_text(card.read_text().replace(key, f"differential_privacy: {{}}\n{key}"))
    assert ["differential_privacy is stated twice" in one.problem for one in findings(folder)] == [True]


def test_flags_and_relations_that_void_the_claim_are_named(tmp_path):
    statement = statement_of(HONEST)
    statement["unsafe_flags"] = ["fixed_randomness"]
    statement["evaluation"]["metrics_are_private"] = not statement["evaluation"]["metrics_are_private"]
    statement["not_covered"] = statement["not_covered"][1:]
    named = {one.field for one in findings(released(tmp_path, statement))}
    assert {"guarantee.epsilon", "unsafe_flags", "evaluation.metrics_are_private", "not_covered"} <= named


@pytest.mark.parametrize("name", ["no/such/folder", "./absent", "absent"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_a_wrong_argument(name, capsys):
    assert cli.main(["verify", name]) == 2
    assert "neither a folder nor a Hub id" in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DPVisionError, match="could not be had"), verify.fetched("owner/name"):
        pass


def test_unknown_accountants_are_refused(tmp_path):
    with pytest.raises(ArgumentRefused, match="choose from prv, pld"):
        verify.verify_folder(tmp_path, ("gdp",))


def test_differences_name_every_leaf():
    one, other = {"a": 1, "b": [1, {"c": 2.0}], "d": True}, {"a": 1.0, "b": [1, {"c": 3.0}], "d": 1, "e": None}
    assert list(differences(one, other)) == [("b[1].c", 2.0, 3.0), ("d", True, 1), ("e", ..., None)]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"seed": None, "accountant": "prv"}, 4),
        ({"seed": None, "accountant": "rdp", "clipping": "automatic", "per_sample_max_grad_norm": 0.3}, 4),
        pytest.param({"seed": None, "accountant": "pld"}, 4, marks=needs_pld),
        ({"seed": None, "logical_batch_size": 64}, 4),  # every example in every step: closed form
        ({"seed": None, "noise_multiplier": 0.03, "accountant": "prv"}, 1),  # below what prv-accountant answers
        ({"seed": None, "disable_dp": True}, 4),
        ({"seed": 0}, 4),  # whose noise can be subtracted, so that it claims nothing
        ({"seed": None}, 0),
    ],
)
def test_every_kind_of_run_is_verified_as_it_is(tmp_path, changes, steps):
    run = trainer(tmp_path, Linear(), **changes, max_steps=max(steps, 1))
    if steps:
        run.train()
    run.save_model()
    run.create_model_card()
    result = verify.verify_folder(tmp_path, ("prv",), forbidden=lambda folder: [])
    assert [str(finding) for finding in result.findings] == []


def test_an_unprotected_model_may_not_carry_the_tags_of_a_private_one(tmp_path, capsys):
    run = trainer(tmp_path, Linear(), seed=None, disable_dp=True)
    run.train()
    run.create_model_card()
    write_statement(tmp_path, run.privacy_statement())
    (tmp_path / "training_args.bin").unlink(missing_ok=True)
    capsys.readouterr()
    assert cli.main(["verify", str(tmp_path)]) == 0
    assert "no privacy, epsilon is infinite" in capsys.readouterr().out
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace("- hf-dpvision\n", "- hf-dpvision\n- dp-sgd\n"))
    assert [finding.field for finding in findings(tmp_path)] == ["tags"]


def test_the_ledger_of_another_run_beside_the_statement_is_named(tmp_path):
    for name in ("one", "other"):
        run = trainer(tmp_path / name, Linear(), seed=None)
        run.train()
        run.save_model()
        run.create_model_card()
    shutil.copy(tmp_path / "other" / "privacy" / "ledger.jsonl", tmp_path / "one" / "privacy" / "ledger.jsonl")
    found = verify.verify_folder(tmp_path / "one", ("prv",), forbidden=lambda folder: []).findings
    assert [finding.field for finding in found] == ["ledger"]


def test_a_finite_epsilon_without_its_grounds_has_not_the_form_of_a_statement(tmp_path):
    statement = statement_of(HONEST) | {"clipping": None, "mechanism": "none"}
    statement["guarantee"]["gdp"] = None
    folder = shutil.copytree(HONEST, tmp_path / "model")
    write_statement(folder, statement)
    assert {"clipping", "mechanism", "guarantee.gdp"} == {one.field for one in findings(folder)}


def test_a_model_of_the_hub_is_verified_without_its_weights(monkeypatch, capsys):
    """A stand-in for the Hub's client: one repository, one commit, a list of what was fetched."""
    fetched = []

    class Hub:
        def model_info(self, name: str) -> SimpleNamespace:
            names = ["README.md", "privacy.json", "model.safetensors", "optimizer.pt"]
            return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=file) for file in names])

        def hf_hub_download(self, name: str, file: str, revision: str) -> str:
            fetched.append((name, file, revision))
            return str(HONEST / file)

    monkeypatch.setattr("hf_dpvision.verify.hub.HfApi", Hub)
    assert cli.main(["verify", "owner/name", "--accountants", "prv"]) == 1
    out = capsys.readouterr().out
    assert "1 difference" in out and "optimizer.pt: may not be released" in out
    assert fetched == [("owner/name", "README.md", "c0ffee"), ("owner/name", "privacy.json", "c0ffee")]
    assert cli.main(["statement", "owner/name"]) == 0


def test_results_of_other_versions_may_differ_by_the_discretisation_only(tmp_path):
    statement = statement_of(HONEST)
    for name in ("lower", "estimate", "upper"):
        statement["accountant"][name] += 0.015
    statement["guarantee"]["epsilon"] = statement["accountant"]["upper"]
    assert "accountant.upper" in {one.field for one in findings(released(tmp_path, statement))}
    statement["accountant"]["version"] = "0.1.1"
    named = {one.field for one in findings(released(tmp_path, statement))}
    assert "accountant.upper" not in named and "guarantee.epsilon" not in named
    statement["accountant"]["upper"] = statement["guarantee"]["epsilon"] = 2.5
    assert "guarantee.epsilon" in {one.field for one in findings(released(tmp_path, statement))}


def test_the_folder_of_a_run_may_hold_what_stays_there_and_says_so(tmp_path, capsys):
    folder = shutil.copytree(HONEST, tmp_path / "outputs")
    (folder / "training_args.bin").write_bytes(b"")
    assert cli.main(["verify", str(folder), "--accountants", "prv"]) == 1
    assert "training_args.bin: may not be released" in capsys.readouterr().out
    (folder / "privacy").mkdir(exist_ok=True)
    (folder / "privacy" / "lock").touch()
    assert cli.main(["verify", str(folder), "--accountants", "prv"]) == 0
    said = capsys.readouterr().out
    assert "push_to_hub leaves out privacy/lock, training_args.bin" in said
    assert "no other file lies there" not in said
