"""Privacy of units: all images of one patient are drawn, clipped and stated as one.

Long, because units go through all parts: data, draws, clipping, claims and processes.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from launching import TORCHRUN, launched_once
from reference import clip_and_sum, difference, mismatch, norm
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_cases import CLASSES, Linear, Pictures, tiny_vit, trainer, visits, weights

from hf_dpvision import cli, verify
from hf_dpvision.accounting.journal import read_journal
from hf_dpvision.data.units import WEIGHTS, ReadableUnits
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.mechanism import PrivateMechanism
from hf_dpvision.model_card import write_model_card
from hf_dpvision.statement import write_statement
from hf_dpvision.verify import consistency, schema
from hf_dpvision.wording import not_covered, unit_in_words


SIZES = (1, 2, 3, 5, 7, 3, 1, 4)  # fewer than MOST, as many, and more
MOST = 3
WORKER = Path(__file__).parent / "processes_worker.py"


class Conv(nn.Module):
    """A convolution, a norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.body(pixel_values).mean((2, 3)))


def unit_trainer(folder: Path, model: nn.Module, pictures: Pictures, sizes: tuple[int, ...] = SIZES, **changes):
    """One step over all units (q = 1) unless changed."""
    rows = changes.pop("rows", None)
    settings = {
        "privacy_unit_column": "patient", "examples_per_unit": MOST, "logical_batch_size": len(sizes), "max_steps": 1,
        "target_delta": 1e-3, "per_device_train_batch_size": 8,
    }  # fmt: skip
    rows = visits(sizes) if rows is None else rows
    return trainer(folder, model, train_dataset=rows.with_transform(pictures), **settings | changes)


@pytest.fixture
def sums(monkeypatch) -> list[dict[str, Tensor]]:
    """The clipped sums of every step, as they are before the noise."""
    found = []
    original = PrivateMechanism.add_noise

    def noted(self, clipped):
        found.append({name: value.clone() for name, value in clipped.items()})
        return original(self, clipped)

    monkeypatch.setattr(PrivateMechanism, "add_noise", noted)
    return found


def rows_by_unit(rows, seen: list[int]) -> dict[str, list[int]]:
    """Patient -> the different rows read."""
    found = defaultdict(set)
    for row in seen:
        found[rows["patient"][row]].add(row)
    return {patient: sorted(some) for patient, some in found.items()}


def loop(model: nn.Module, rows, chosen: list[list[int]], views: int) -> list[dict[str, Tensor]]:
    """The slow truth: per unit the sum over its rows of the mean over views, by ordinary autograd."""
    trainable = dict(model.named_parameters())
    found = []
    for unit in chosen:
        loss = 0
        for row in unit:
            picture = torch.tensor(rows["pixels"][row], dtype=torch.float64).view(1, 3, 16, 16)
            label = torch.tensor([rows["class"][row]])
            for view in (picture, picture.flip(2))[:views]:
                logits = model(pixel_values=view)
                loss = loss + F.cross_entropy(getattr(logits, "logits", logits), label) / views
        grads = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        pairs = zip(trainable.items(), grads, strict=True)
        found.append({name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs})
    return found


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("build", "bound"), [(tiny_vit, 10.0), (Conv, 2.0)])
def test_the_clipped_sum_of_a_step_is_that_of_the_loop_over_units(tmp_path, sums, build, bound, passes, views):
    model = build().double()
    before = copy.deepcopy(model)
    pictures, rows = Pictures(torch.float64, turning=views == 2), visits(SIZES)
    run = unit_trainer(
        tmp_path, model, pictures, backward_passes=passes, augmentation_multiplicity=views,
        per_sample_max_grad_norm=bound,
    )  # fmt: skip
    run.train()
    chosen = rows_by_unit(rows, pictures.seen[1:])  # the first is looked at for its shape
    assert sorted(map(len, chosen.values())) == sorted(min(size, MOST) for size in SIZES)
    gradients = loop(before, rows, list(chosen.values()), views)
    truth = clip_and_sum(gradients, run.args.build_clipping())
    shortened = int((truth.norms > bound).sum())
    assert 0 < shortened < len(SIZES)  # some are clipped, some are not
    assert not mismatch(truth.norms, sums[0], truth, tolerance=1e-9, own=1e-6)


@pytest.mark.parametrize("build", [tiny_vit, Conv])
def test_zeroing_out_a_unit_moves_the_sum_by_at_most_the_clip_norm(tmp_path, sums, build):
    rows, bound = visits(SIZES), 0.05
    for patient in (None, "p4", "p0"):
        owned = zip(rows["patient"], rows["class"], strict=True)
        labels = [-1 if owner == patient else label for owner, label in owned]
        changed = rows.remove_columns("class").add_column("class", labels)
        unit_trainer(
            tmp_path / str(patient), build(), Pictures(), rows=changed, per_sample_max_grad_norm=bound
        ).train()
    for without in sums[1:]:
        moved = norm(difference(sums[0], without)).item()
        assert 0.99 * bound < moved < bound * (1 + 1e-5)


def test_a_unit_is_drawn_as_a_whole_and_never_in_part(tmp_path):
    pictures, rows = Pictures(), visits(SIZES)
    run = unit_trainer(
        tmp_path, Linear(), pictures, examples_per_unit=7, logical_batch_size=2, max_steps=30, target_delta=1e-4
    )
    drawn = []
    mechanism_step = run.training_step

    def noted(model, inputs, num_items_in_batch=None):
        pictures.seen.clear()
        result = mechanism_step(model, inputs, num_items_in_batch)
        drawn.append(rows_by_unit(rows, pictures.seen))
        return result

    run.training_step = noted
    run.train()
    whole = rows_by_unit(rows, list(range(len(rows))))
    assert all(found[patient] == whole[patient] for found in drawn for patient in found)
    assert len({tuple(sorted(found)) for found in drawn}) > 10 and {} in drawn
    event = run.privacy_statement()["events"][0]
    assert event == {"sample_rate": 2 / len(SIZES), "noise_multiplier": 1.0, "steps": 30}
    assert run.privacy_statement()["sampling"]["dataset_size"] == len(SIZES)


def test_what_fills_up_has_no_influence(tmp_path, monkeypatch):
    plain = unit_trainer(tmp_path / "plain", tiny_vit(), Pictures(), max_steps=3)
    plain.train()
    filled = []
    original = ReadableUnits.__call__

    def other_filling(self, units):
        batch = original(self, units)
        filler = batch[WEIGHTS] == 0
        batch["pixel_values"][filler] = 100 * torch.randn_like(batch["pixel_values"][filler])
        filled.append(int(filler.sum()))
        return batch

    monkeypatch.setattr(ReadableUnits, "__call__", other_filling)
    other = unit_trainer(tmp_path / "other", tiny_vit(), Pictures(), max_steps=3)
    other.train()
    assert sum(filled) == 3 * (2 + 1 + 2)  # of the units with 1 and 2 images, in every step
    assert (weights(plain.model) - weights(other.model)).abs().max() < 1e-6


def test_unreadable_images_are_left_out_of_their_unit_and_a_unit_without_others_out_of_the_sum(tmp_path, sums):
    rows = visits(SIZES)
    whole = rows_by_unit(rows, list(range(len(rows))))
    broken = [whole["p2"][1], *whole["p1"], *whole["p4"][:5]]
    broken = tuple(row for row in broken if row != 0)
    model = Conv().double()
    before = copy.deepcopy(model)
    unit_trainer(tmp_path, model, Pictures(torch.float64, broken=broken), examples_per_unit=7).train()
    left = [[row for row in unit if row not in broken] for unit in whole.values()]
    truth = clip_and_sum(loop(before, rows, [unit for unit in left if unit], 1), PLAIN)
    assert not mismatch(truth.norms, sums[0], truth, tolerance=1e-9)


class _Plain:
    """Factors of C = 1, the default."""

    def factors(self, squared_norms: Tensor) -> Tensor:
        return (1.0 / squared_norms.sqrt()).clamp(max=1.0)


PLAIN = _Plain()


@pytest.mark.parametrize("changes", [{"dataloader_num_workers": 2}, {"per_device_train_batch_size": 1}])
def test_workers_and_the_physical_batch_change_nothing(tmp_path, changes):
    found = []
    for name, more in (("plain", {}), ("other", changes)):
        run = unit_trainer(tmp_path / name, tiny_vit(), Pictures(), logical_batch_size=4, max_steps=4, **more)
        run.train()
        found.append(weights(run.model))
    assert (found[0] - found[1]).abs().max() < 1e-6
    assert (found[0] - weights(tiny_vit())).abs().max() > 1e-3


def test_the_physical_batch_counts_images_and_keeps_units_together(tmp_path, monkeypatch):
    sizes = []

    def notes(self, model, inputs):
        assert WEIGHTS not in inputs
        sizes.append(len(inputs["labels"]))
        return original(self, model, inputs)

    run = unit_trainer(tmp_path, Linear(), Pictures(), per_device_train_batch_size=13, augmentation_multiplicity=2)
    original = type(run).per_sample_loss
    monkeypatch.setattr(type(run), "per_sample_loss", notes)
    run.train()
    assert sizes == [2 * 2 * MOST] * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"self_check": True},
        {"self_check": True, "per_device_train_batch_size": "auto"},
        {"disable_dp": True},
        {"examples_per_unit": 1},
        {"clipping": "automatic", "bf16": True},
    ],
)
def test_it_works_together_with(tmp_path, changes):
    run = unit_trainer(tmp_path, tiny_vit(), Pictures(), eval_dataset=None, **changes)
    before = weights(run.model)
    run.train()
    assert (weights(run.model) - before).abs().max() > 1e-4 and torch.isfinite(weights(run.model)).all()


@pytest.mark.parametrize("names", ["", "p{}"])
def test_the_column_of_a_plain_data_set_never_reaches_the_model(tmp_path, names):
    rows = visits(SIZES, names).remove_columns("row").rename_columns({"pixels": "pixel_values", "class": "labels"})
    rows = rows.add_column("scan", list(range(len(rows)))).with_format("torch")
    run = trainer(
        tmp_path, Linear(), train_dataset=rows, privacy_unit_column="patient", id_column="scan",
        logical_batch_size=4, target_delta=1e-3, self_check=True,
    )  # fmt: skip
    run.train()  # the forward of Linear takes pixel_values and nothing else
    assert run.state.global_step == 4


def test_a_run_of_units_is_resumed_with_the_draws_it_would_have_had(tmp_path):
    saving = {"logical_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "target_delta": 1e-3}
    through = unit_trainer(tmp_path / "through", tiny_vit(), Pictures(), max_steps=4, **saving)
    through.train()
    half = unit_trainer(tmp_path / "half", tiny_vit(), Pictures(), max_steps=2, **saving)
    half.train()
    again = unit_trainer(tmp_path / "half", tiny_vit(), Pictures(), max_steps=4, **saving)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(through.model))


def test_a_run_is_not_resumed_with_another_unit(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    unit_trainer(tmp_path, Linear(), Pictures(), max_steps=1, **saving).train()
    again = unit_trainer(tmp_path, Linear(), Pictures(), max_steps=2, examples_per_unit=5, **saving)
    with pytest.raises(ArgumentRefused, match="examples_per_unit: 5 now, 3 before"):
        again.train(resume_from_checkpoint=True)


def test_a_second_training_with_another_unit_is_refused(tmp_path):
    run = unit_trainer(tmp_path, Linear(), Pictures())
    run.train()
    spent = run.epsilon()
    run.args.privacy_unit_column, run.args.privacy_unit, run.args.examples_per_unit = None, "example", None
    with pytest.raises(ArgumentRefused, match="privacy_unit: 'example' now, 'unit' before"):
        run.train()
    assert run.epsilon() == spent


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy_unit": "example"}, "privacy_unit='example' contradicts privacy_unit_column"),
        ({"privacy_unit": "unit", "privacy_unit_column": None, "examples_per_unit": None}, "contradicts"),
        ({"privacy_unit_column": None}, "examples_per_unit=3 Give both, or neither"),
        ({"privacy_unit_column": ""}, "privacy_unit_column='' name of a column"),
        ({"examples_per_unit": 0}, "examples_per_unit=0 whole number"),
        ({"examples_per_unit": 2.5}, "examples_per_unit=2.5 whole number"),
        ({"examples_per_unit": True}, "examples_per_unit=True whole number"),
        ({"id_column": "patient"}, "id_column='patient' privacy_unit_column as well"),
        ({"id_column": 3}, "id_column=3 name of a column"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(tmp_path, changes, words):
    with pytest.raises(ArgumentRefused) as refusal:
        unit_trainer(tmp_path, Linear(), Pictures(), **changes)
    for word in words.split():
        assert word in str(refusal.value)


def test_the_unit_follows_from_the_column(tmp_path):
    args = unit_trainer(tmp_path, Linear(), Pictures(), examples_per_unit=None).args
    assert (args.privacy_unit, args.examples_per_unit, args.rows_per_unit) == ("unit", 4, 4)
    args = trainer(tmp_path, Linear()).args
    assert (args.privacy_unit, args.examples_per_unit, args.rows_per_unit) == ("example", None, 1)


def test_two_processes_equal_one_whole_and_sharded(tmp_path_factory, tmp_path):
    launched = launched_once(tmp_path_factory, "units", TORCHRUN, WORKER, "units")
    assert launched.code == 0, launched.stderr[-3000:]
    alone = unit_trainer(tmp_path, tiny_vit(), Pictures(), logical_batch_size=4, max_steps=6)
    alone.train()
    for kind in ("whole", "sharded"):
        together = torch.load(launched.folder / "units" / f"{kind}.pt", weights_only=True)
        assert (together - weights(alone.model)).abs().max() < 1e-6, kind
    assert (weights(alone.model) - weights(tiny_vit())).abs().max() > 1e-3


def released(folder: Path, **changes):
    """The statement of a private run of units, saved with its card."""
    run = unit_trainer(
        folder, Linear(), Pictures(), seed=None, logical_batch_size=2, max_steps=4, target_delta=1e-4, **changes
    )
    run.train()
    run.save_model()
    run.create_model_card()
    return run.privacy_statement()


def findings(folder: Path) -> list[verify.Finding]:
    return list(verify.verify_folder(folder, ("prv",), forbidden=lambda _: []).findings)


@pytest.mark.parametrize("changes", [{}, {"disable_dp": True}, {"accountant": "prv", "augmentation_multiplicity": 2}])
def test_a_run_of_units_is_verified_as_it_is(tmp_path, changes):
    released(tmp_path, **changes)
    assert [str(finding) for finding in findings(tmp_path)] == []


def test_an_odd_name_of_the_column_breaks_no_line_of_card_and_claim(tmp_path):
    name = "pa|t\nie`n'*t*"
    statement = released(tmp_path, rows=visits(SIZES).rename_column("patient", name), privacy_unit_column=name)
    assert statement["grouping"]["column"] == name
    assert [str(finding) for finding in findings(tmp_path)] == []


def test_unit_column_and_number_stand_wherever_epsilon_does(tmp_path, capsys):
    statement = released(tmp_path)
    assert statement["schema_version"] == "1.3" and statement["unit_of_privacy"] == "unit"
    assert statement["grouping"] == {"column": "patient", "examples_per_unit": MOST}
    assert statement["sampling"]["dataset_size"] == len(SIZES)
    assert cli.main(["statement", str(tmp_path)]) == 0
    card, plain = (tmp_path / "README.md").read_text(), capsys.readouterr().out
    for text in (statement["claim"], card, plain):
        assert "column 'patient'" in text and f"at most {MOST}" in text and "one image" not in text
    assert "equal, but for one unit that is zeroed out" in statement["claim"]
    assert f"The number of units, N = {len(SIZES)}, is public" in statement["claim"]
    assert "Each step draws every unit independently" in statement["claim"]
    for text in (card, plain):
        assert "one unit, with all its examples, contributes nothing; the number of units is public" in text
        assert "training units N" in text and "Several units, taken together" in text
    (facts,) = read_journal(tmp_path).calls
    named = ("privacy_unit", "privacy_unit_column", "examples_per_unit", "dataset_size")
    assert [facts[name] for name in named] == ["unit", "patient", MOST, len(SIZES)]
    capsys.readouterr()
    cli.main(["verify", str(tmp_path), "--accountants", "prv"])
    assert "for all training images with the same value in column 'patient'" in capsys.readouterr().out


def test_values_of_the_column_are_in_no_file(tmp_path):
    run = unit_trainer(
        tmp_path, Linear(), Pictures(), rows=visits(SIZES, "planted-name-{}"), save_strategy="steps", save_steps=1
    )
    run.train()
    run.save_model()
    run.create_model_card()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if b"planted-name" in path.read_bytes()]


def tampered(statement: dict, change: str) -> dict:
    """The statement with another unit."""
    other = copy.deepcopy(statement)
    if change == "column":
        other["grouping"]["column"] = "hospital"
    elif change == "number":
        other["grouping"]["examples_per_unit"] = 1
    elif change == "no grouping":
        other["grouping"] = None
    elif change == "example":
        other["unit_of_privacy"], other["grouping"] = "example", None
    return other


@pytest.mark.parametrize("change", ["column", "number", "no grouping", "example"])
def test_another_unit_in_the_statement_is_found(tmp_path, change):
    write_statement(tmp_path, tampered(released(tmp_path), change))
    named = {finding.field for finding in findings(tmp_path)}
    assert named & {"grouping", "grouping.column", "grouping.examples_per_unit", "unit_of_privacy"}
    if change != "no grouping":  # which has not the form of a statement
        assert "claim" in named and any(field.startswith("differential_privacy.") for field in named)


@pytest.mark.parametrize("change", ["column", "number", "example"])
def test_another_unit_is_found_by_the_ledger_even_if_words_and_card_were_rewritten(tmp_path, change):
    statement = tampered(released(tmp_path), change)
    grouping = statement["grouping"] or {"column": None, "examples_per_unit": None}
    unit = unit_in_words(grouping["column"], grouping["examples_per_unit"])
    statement["not_covered"] = not_covered("private", unit)
    statement["claim"] = consistency._claim(statement)
    write_statement(tmp_path, statement)
    write_model_card(tmp_path, statement, model_name=tmp_path.name)
    found = findings(tmp_path)
    assert found and all("privacy/ledger.jsonl" in finding.problem for finding in found)
    assert {finding.field for finding in found} <= {
        "unit_of_privacy", "grouping.column", "grouping.examples_per_unit"
    }  # fmt: skip


def test_a_statement_of_an_older_schema_cannot_name_a_unit(tmp_path):
    statement = released(tmp_path) | {"schema_version": "1.1"}
    _, found = schema.read_statement(write_statement(tmp_path, statement), "privacy.json")
    assert {finding.field for finding in found} >= {"unit_of_privacy"}
