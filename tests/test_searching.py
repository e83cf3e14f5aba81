"""A search over settings states what all of it costs, also after it was killed, and lets nothing else out.

Long, because both ways to pay are held to the same properties.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import Images, Linear, trainer, weights
from transformers import TrainerCallback, TrainingArguments

from hf_dpvision import DPTrainingArguments, accounting, verify
from hf_dpvision.accounting import Event, Ledger, TruncatedNegativeBinomial, selection
from hf_dpvision.accounting.journal import read_journal
from hf_dpvision.clipping import Flat, PerGroup
from hf_dpvision.errors import ArgumentRefused, BudgetExceeded, LedgerRefused
from hf_dpvision.optimisation import AdamBC
from hf_dpvision.release import released_files, unexpected_files
from hf_dpvision.search_space import _FREE, _PRICED, Draws
from hf_dpvision.search_state import WORK, Result, SearchState


RATE, STEPS = 8 / 64, 4
STOPPING = TruncatedNegativeBinomial(mean=3.0)


def space(draws: Draws) -> dict:
    return {"learning_rate": draws.suggest_float("learning_rate", 1e-3, 1.0, log=True)}


def searching(folder: Path, **changes):
    settings = {"seed": None, "eval_dataset": Images(40), "eval_data": "public"}
    return trainer(folder, Linear(), **settings | changes)


def of_runs(monkeypatch, count: int) -> None:
    """Fix how many runs a draw gives."""
    monkeypatch.setattr("hf_dpvision.searching.draw_runs", lambda stopping: count)


def findings(run) -> list[str]:
    run.save_model()
    run.create_model_card()
    result = verify.verify_folder(Path(run.args.output_dir), ("prv",), forbidden=lambda folder: [])
    return [str(finding) for finding in result.findings]


class Killed(RuntimeError):
    """Stands for the end of the process."""


class KillAt(TrainerCallback):
    """Ends everything behind the `step`-th step of all runs together."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise Killed


def test_all_steps_of_all_trials_are_composed(tmp_path):
    run = searching(tmp_path)
    best = run.hyperparameter_search(space, n_trials=3)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in run.model.state_dict().items())
    composed = Ledger([Event(RATE, 1.0, 3 * STEPS)])
    assert run.epsilon().upper == composed.epsilon(1e-4, "rdp").upper
    assert run._run.ledger == read_journal(tmp_path).ledger == composed
    statement = run.privacy_statement()
    assert statement["guarantee"]["epsilon"] == composed.epsilon(1e-4, "rdp").upper
    assert statement["hyperparameter_tuning"]["runs_accounted"] == 3 and statement["steps"] == 12
    assert findings(run) == []
    card = (tmp_path / "README.md").read_text()
    assert "accounted for: 3 runs" in card and "3 runs on the same data" in card
    record = json.loads((tmp_path / "search.json").read_text())
    scores = [one["objective"] for one in record["runs"]]
    assert best.objective == min(scores) and scores.index(min(scores)) == int(best.run_id) == record["best"]
    assert not (tmp_path / WORK).exists()


def test_the_model_is_the_best_one_with_its_settings_and_every_run_starts_from_the_same_weights(tmp_path):
    starts = []

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            starts.append((weights(model).clone(), args.learning_rate))

    run = searching(tmp_path, callbacks=[Start()])
    best = run.hyperparameter_search(space, lambda metrics: metrics["eval_loss"], n_trials=3)
    assert run.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-6)
    assert run.args.learning_rate == best.hyperparameters["learning_rate"]
    assert len({rate for _, rate in starts}) == 3
    assert all(torch.equal(start, starts[0][0]) for start, _ in starts)
    assert run.optimizer is None and all(p.grad is None for p in run.model.parameters())


def test_trials_that_cost_differently_are_composed_each_at_its_price(tmp_path):
    batches = iter([4, 16])

    def priced(draws):
        batch = next(batches)
        return {"logical_batch_size": batch, "noise_multiplier": 2.0 if batch == 4 else 1.0, "max_steps": batch // 2}

    run = searching(tmp_path, accountant="prv")
    run.hyperparameter_search(priced, lambda metrics: float(run.args.logical_batch_size), n_trials=2)
    events = (Event(4 / 64, 2.0, 2), Event(16 / 64, 1.0, 8))
    assert run._run.ledger.events == events
    assert run.epsilon().upper == Ledger(events).epsilon(1e-4).upper
    said = run.privacy_statement()  # the first run is the best, whose sampling and noise are stated
    assert said["sampling"]["expected_batch_size"] == 4 and said["noise"]["multiplier"] == 2.0
    assert findings(run) == []


def test_a_target_is_that_of_the_whole_search(tmp_path):
    run = searching(tmp_path / "composed", noise_multiplier=None, target_epsilon=3.0, accountant="prv")
    run.hyperparameter_search(space, n_trials=3)
    assert 2.9 < run.epsilon().upper <= 3.0
    run = searching(tmp_path / "stopped", noise_multiplier=None, target_epsilon=3.0)
    run.hyperparameter_search(space, stopping=STOPPING)
    assert 2.9 < run.epsilon().upper <= 3.0
    assert run.privacy_statement()["guarantee"]["epsilon"] <= 3.0


@pytest.mark.parametrize("count", [1, 3])
def test_with_random_stopping_the_whole_search_is_stated_and_nothing_of_the_others(tmp_path, monkeypatch, count):
    of_runs(monkeypatch, count)
    run = searching(tmp_path)
    best = run.hyperparameter_search(space, stopping=STOPPING)
    total = selection.epsilon((Event(RATE, 1.0, STEPS),), 1e-4, STOPPING)
    single = accounting.epsilon(sample_rate=RATE, noise_multiplier=1.0, steps=STEPS, delta=1e-4, accountant="rdp")
    assert run.epsilon().upper == total.upper > single.upper
    assert findings(run) == []
    said = run.privacy_statement()
    assert said["guarantee"]["epsilon"] == total.upper and said["steps"] == STEPS
    assert said["hyperparameter_tuning"]["runs_accounted"] is None
    assert run.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-6)
    evaluations = [logs for logs in run.state.log_history if "eval_loss" in logs]
    assert evaluations[0]["eval_loss"] == pytest.approx(best.objective, rel=1e-6) and len(evaluations) == 2
    assert read_journal(tmp_path).ledger.steps == STEPS
    assert json.loads((tmp_path / "privacy.json").read_text()) == said
    assert {path.name for path in tmp_path.iterdir()} <= {
        "privacy", "search.json", "README.md", "privacy.json", "model.safetensors", "training_args.bin", "runs",
    }  # fmt: skip
    assert unexpected_files(tmp_path) == [] and "search.json" not in released_files(tmp_path)
    record = json.loads((tmp_path / "search.json").read_text())
    assert record["best"] == {"settings": best.hyperparameters, "objective": best.objective} and "runs" not in record


def test_nothing_that_is_left_tells_how_many_runs_there_were(tmp_path, monkeypatch):
    """With equal settings, a search of one run and one of four leave the same but for weights, scores and digests."""
    left = []
    for count in (1, 4):
        of_runs(monkeypatch, count)
        run = searching(tmp_path / str(count))
        best = run.hyperparameter_search(lambda draws: {"learning_rate": 0.1}, stopping=STOPPING)
        statement = run.privacy_statement()
        statement["ledger"].pop("run_id"), statement["ledger"].pop("chain")
        record = json.loads((tmp_path / str(count) / "search.json").read_text())
        record["best"].pop("objective")
        histories = [sorted(logs) for logs in run.state.log_history]
        lines = (tmp_path / str(count) / "privacy" / "ledger.jsonl").read_text().count("\n")
        left.append((statement, record, histories, lines, best.run_id, best.hyperparameters, run.state.global_step))
    assert left[0] == left[1]


def test_no_callback_hears_of_a_run_whose_number_is_secret(tmp_path, monkeypatch, capfd):
    of_runs(monkeypatch, 3)

    class Listening(TrainerCallback):
        pass

    with pytest.raises(ArgumentRefused, match="Listening would hear of every run"):
        searching(tmp_path, callbacks=[Listening()]).hyperparameter_search(space, stopping=STOPPING)
    run = searching(tmp_path, disable_tqdm=False)
    capfd.readouterr()
    callbacks = list(run.callback_handler.callbacks)
    run.hyperparameter_search(space, stopping=STOPPING)
    out = "".join(capfd.readouterr())
    assert "eval_loss" not in out and "whole search" in out
    assert run.callback_handler.callbacks == callbacks


def test_no_run_is_uploaded(tmp_path, monkeypatch):
    of_runs(monkeypatch, 2)
    run = searching(tmp_path, save_strategy="steps", save_steps=2)
    run.args.push_to_hub = True

    def uploads(*args, **kwargs):
        pytest.fail("uploaded")

    for name in ("push_to_hub", "_push_from_checkpoint", "_save_checkpoint"):
        monkeypatch.setattr(run, name, uploads)
    run.hyperparameter_search(space, stopping=STOPPING)
    assert run.args.save_strategy == "steps" and run.args.push_to_hub


def test_a_killed_search_goes_on_with_the_lost_run_charged(tmp_path):
    run = searching(tmp_path, callbacks=[KillAt(STEPS + 2)])
    with pytest.raises(Killed):
        run.hyperparameter_search(space, n_trials=3)
    assert read_journal(tmp_path).ledger.steps == STEPS + 2
    with pytest.raises(ArgumentRefused, match="not finished"):
        searching(tmp_path).hyperparameter_search(space, n_trials=3)
    again = searching(tmp_path)
    best = again.hyperparameter_search(resume=True)
    assert again._run.ledger.steps == read_journal(tmp_path).ledger.steps == 2 * STEPS + 2
    assert again.epsilon().upper == Ledger([Event(RATE, 1.0, 2 * STEPS + 2)]).epsilon(1e-4, "rdp").upper
    scores = [one["objective"] for one in json.loads((tmp_path / "search.json").read_text())["runs"]]
    assert scores[1] is None and best.objective == min(scores[0], scores[2])
    assert again.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-6)
    assert findings(again) == []


def test_a_search_killed_in_its_last_run_ends_with_the_best_of_the_others(tmp_path):
    run = searching(tmp_path, callbacks=[KillAt(2 * STEPS + 1)])
    with pytest.raises(Killed):
        run.hyperparameter_search(space, n_trials=3)
    with (tmp_path / "privacy" / "ledger.jsonl").open("a") as file:
        file.write('{"kind": "st')  # torn: it counts
    again = searching(tmp_path)
    again.hyperparameter_search(resume=True)
    assert again._run.ledger.steps == 2 * STEPS + 2
    assert findings(again) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": 9}, "run 0 would be"),
        ({"noise_multiplier": 5.0}, "noise_multiplier: 5.0 now, 1.0 before"),
        ({"logical_batch_size": 16}, "logical_batch_size: 16 now"),
        ({"target_delta": 1e-3}, "target_delta"),
        ({"train_dataset": Images(32)}, "dataset_size: 32 now"),
    ],
)
def test_a_search_does_not_go_on_with_runs_of_another_cost(tmp_path, monkeypatch, changes, words):
    of_runs(monkeypatch, 2)
    run = searching(tmp_path)
    monkeypatch.setattr(run, "train", lambda: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run.hyperparameter_search(space, stopping=STOPPING)
    with pytest.raises(ArgumentRefused, match=words):
        searching(tmp_path, **changes).hyperparameter_search(resume=True)


def test_without_its_ledger_a_search_does_not_go_on(tmp_path):
    run = searching(tmp_path, callbacks=[KillAt(STEPS + 2)])
    with pytest.raises(Killed):
        run.hyperparameter_search(space, n_trials=2)
    shutil.rmtree(tmp_path / "privacy")
    with pytest.raises(LedgerRefused, match="what was spent"):
        searching(tmp_path).hyperparameter_search(resume=True)


def test_a_killed_search_with_random_stopping_keeps_its_number_of_runs(tmp_path, monkeypatch):
    of_runs(monkeypatch, 3)
    run = searching(tmp_path)
    evaluate, told = run.evaluate, []

    def dies(*args, **kwargs):
        told.append(1)
        if len(told) == 2:
            raise Killed
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(run, "evaluate", dies)
    with pytest.raises(Killed):
        run.hyperparameter_search(space, stopping=STOPPING)
    assert (tmp_path / WORK).stat().st_mode & 0o077 == 0
    monkeypatch.undo()
    monkeypatch.setattr("hf_dpvision.searching.draw_runs", lambda stopping: pytest.fail("drawn again"))
    again = searching(tmp_path)
    again.hyperparameter_search(resume=True)
    assert again.epsilon().upper == selection.epsilon((Event(RATE, 1.0, STEPS),), 1e-4, STOPPING).upper
    assert findings(again) == []


def test_every_run_is_written_down_before_it_begins(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(json.loads((tmp_path / WORK / "state.json").read_text())["started"])

    searching(tmp_path, callbacks=[Look()]).hyperparameter_search(space, n_trials=2)
    assert seen == [1, 2]


def test_no_run_at_all_releases_nothing(tmp_path, monkeypatch):
    of_runs(monkeypatch, 0)
    run = searching(tmp_path)
    before = weights(run.model).clone()
    with pytest.raises(BudgetExceeded, match="no model to release"):
        run.hyperparameter_search(space, stopping=accounting.Poisson(3.0))
    assert torch.equal(weights(run.model), before) and not (tmp_path / WORK).exists()


@pytest.mark.parametrize(
    ("changes", "call", "words"),
    [
        ({}, {}, "hp_space is needed"),
        ({}, {"hp_space": space}, "their number must be known"),
        ({}, {"hp_space": space, "n_trials": 0}, "at least 1"),
        ({}, {"hp_space": space, "n_trials": 2, "stopping": STOPPING}, "Leave out one"),
        ({}, {"hp_space": space, "stopping": 3}, "draws no number"),
        ({}, {"hp_space": space, "n_trials": 2, "direction": "up"}, "direction"),
        ({}, {"resume": True}, "no unfinished search"),
        ({"eval_dataset": None}, {"hp_space": space, "n_trials": 2}, "held-out data"),
        ({"eval_dataset": Images()}, {"hp_space": space, "n_trials": 2}, "is the training set"),
        ({"disable_dp": True}, {"hp_space": space, "n_trials": 2}, "nothing has to be paid"),
        ({}, {"hp_space": lambda draws: {"seed": 1}, "n_trials": 2}, "cannot be searched over"),
        ({}, {"hp_space": lambda draws: {"target_delta": 1e-3}, "n_trials": 2}, "cannot be searched over"),
        ({}, {"hp_space": lambda draws: {"max_steps": 9}, "stopping": STOPPING}, "every run must cost the same"),
        ({}, {"hp_space": lambda draws: {"noise_multiplier": 9.0}, "stopping": STOPPING}, "must cost the same"),
        ({}, {"hp_space": lambda draws: {"learning_rate": torch.ones(1)}, "n_trials": 1}, "written to disk"),
        ({}, {"hp_space": lambda draws: {"logical_batch_size": 65}, "n_trials": 1}, "larger than the training set"),
        ({}, {"hp_space": lambda draws: {"clipping": "none"}, "n_trials": 1}, "not known"),
        (
            {},
            {"hp_space": lambda draws: {"clipping": "per_group", "clipping_groups": {"head.w": "w"}}, "n_trials": 1},
            "leave out the parameter",
        ),
        ({}, {"hp_space": lambda draws: {"optim": "lomo"}, "n_trials": 1}, "optim="),
        ({}, {"hp_space": lambda draws: {"ema_decay": 0.9, "tail_averaging": 2}, "n_trials": 1}, "one average"),
        (
            {"noise_multiplier": None, "target_epsilon": 2.0},
            {"hp_space": lambda draws: {"noise_multiplier": 1.0}, "n_trials": 1},
            "decides about the noise",
        ),
    ],
)
def test_what_could_not_be_paid_for_is_refused_with_nothing_spent(tmp_path, changes, call, words):
    data = Images()
    changes = {name: data if isinstance(value, Images) else value for name, value in changes.items()}
    run = searching(tmp_path, train_dataset=data, **changes)
    with pytest.raises(ArgumentRefused, match=words):
        run.hyperparameter_search(**call)
    assert read_journal(tmp_path) is None and not (tmp_path / WORK / "state.json").exists()
    run.args.disable_dp, run.eval_dataset = False, None
    run.train()  # it still can


def test_a_trainer_that_has_trained_does_not_search(tmp_path):
    run = searching(tmp_path)
    run.train()
    for one in (run, searching(tmp_path)):
        with pytest.raises(ArgumentRefused, match="has trained already"):
            one.hyperparameter_search(space, n_trials=2)


def test_a_smaller_epsilon_than_that_of_the_search_is_named(tmp_path, monkeypatch):
    of_runs(monkeypatch, 2)
    run = searching(tmp_path)
    run.hyperparameter_search(space, stopping=STOPPING)
    said = run.privacy_statement()
    for changes in (
        {"on_private_data": "unknown", "method": "none", "runs_accounted": 1, "stopping": None},
        said["hyperparameter_tuning"] | {"stopping": {"distribution": "poisson", "mean": 2.0, "shape": None}},
        said["hyperparameter_tuning"] | {"stopping": {**STOPPING.to_dict(), "mean": 2.0}},
    ):
        monkeypatch.setattr(run, "privacy_statement", lambda c=changes: said | {"hyperparameter_tuning": c})
        assert any("epsilon" in one or "gdp" in one or "accountant" in one for one in findings(run)), changes
    single = accounting.epsilon(sample_rate=RATE, noise_multiplier=1.0, steps=STEPS, delta=1e-4).upper
    lower = said | {"guarantee": said["guarantee"] | {"epsilon": single}}
    monkeypatch.setattr(run, "privacy_statement", lambda: lower)
    assert any("guarantee.epsilon" in one for one in findings(run))


def test_what_follows_a_search_in_its_folder_goes_on_costing_what_it_cost(tmp_path, monkeypatch):
    of_runs(monkeypatch, 2)
    searching(tmp_path).hyperparameter_search(space, stopping=STOPPING)
    after = searching(tmp_path)
    after.train(resume_from_checkpoint=True)
    assert after.epsilon().upper == selection.epsilon((Event(RATE, 1.0, 2 * STEPS),), 1e-4, STOPPING).upper
    assert after.privacy_statement()["hyperparameter_tuning"]["method"] == "random-stopping"
    assert findings(after) == []


def test_a_statement_that_is_silent_about_the_search_contradicts_its_ledger(tmp_path, monkeypatch):
    of_runs(monkeypatch, 2)
    run = searching(tmp_path)
    run.hyperparameter_search(space, stopping=STOPPING)
    run._run.search = None
    assert any("hyperparameter_tuning.stopping" in one for one in findings(run))


def test_settings_behind_the_noise_and_of_clipping_and_views_may_vary_and_cost_nothing(tmp_path, monkeypatch):
    candidates = (
        {"optim": "adamw_torch", "noise_bias_correction": True, "noise_bias_floor": 0.5},
        {"low_pass_filter": 2, "low_pass_cutoff": 0.2, "ema_decay": 0.5},
        {"clipping": "per_layer", "group_clipping": "automatic", "clipping_shares": "size"},
        {"clipping": "per_group", "clipping_groups": {"": "all"}, "tail_averaging": 2},
        {"augmentation_multiplicity": 2},
    )
    drawn, used, checked = iter(candidates), [], []

    class Used(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            used.append((args, type(optimizer.optimizer)))

    def checking(*args, clipping, rows, **more):
        checked.append((type(clipping), rows))

    monkeypatch.setattr("hf_dpvision.rehearsal.self_check", checking)
    run = searching(tmp_path, callbacks=[Used()], self_check=True)
    run.hyperparameter_search(lambda draws: next(drawn), n_trials=5)
    for settings, (args, _) in zip(candidates, used, strict=True):
        assert settings == {name: getattr(args, name) for name in settings}
    assert [kind is AdamBC for _, kind in used] == [True, False, False, False, False]
    assert checked == [(Flat, 1), (Flat, 1), (PerGroup, 1), (PerGroup, 1), (Flat, 2)]
    assert run._run.ledger == Ledger([Event(RATE, 1.0, 5 * STEPS)])
    assert findings(run) == []


def test_every_argument_of_ours_is_searched_over_or_there_is_a_reason_against_it():
    kept = {
        "say whom the guarantee protects, or how well": {
            "target_epsilon", "target_delta", "privacy_unit", "privacy_unit_column", "examples_per_unit", "id_column",
            "accountant", "disable_dp", "secure_noise", "eval_data",
        },
        "change nothing in the result": {
            "norm_rule", "backward_passes", "memory_bound", "self_check", "dataloader_timeout", "full_determinism",
            "per_device_train_batch_size", "auto_find_batch_size", "average_tokens_across_devices",
            "activation_checkpointing", "activation_checkpointing_kwargs",  # ours where transformers lacks the name
        },
        "say what is read, or where things are written": {
            "train_data_name", "train_dataset_size", "stream_sampling", "stream_window_steps", "stream_dir",
            "run_report", "logging_steps", "save_total_limit", "remove_unused_columns", "label_names",
        },
        "must stay": {"max_grad_norm"},
    }  # fmt: skip
    inherited = {field.name: field.default for field in fields(TrainingArguments)}
    own = {one.name for one in fields(DPTrainingArguments) if inherited.get(one.name, MISSING) is not one.default}
    searched = set(_FREE + _PRICED)
    reasons = set().union(*kept.values())
    assert not searched & reasons
    assert own <= searched | reasons, sorted(own - searched - reasons)
    assert reasons <= {one.name for one in fields(DPTrainingArguments)}


@pytest.mark.parametrize("call", [{"n_trials": 2}, {"stopping": STOPPING}])
def test_how_far_the_iterates_of_other_runs_lay_apart_is_not_told(tmp_path, call):
    run = searching(tmp_path, tail_averaging=2)
    run.hyperparameter_search(space, **call)
    run.create_model_card()
    assert "iterate std" not in (tmp_path / "README.md").read_text()


def test_draws_stay_in_their_range_and_reach_all_of_it():
    draws = Draws()
    floats = [draws.suggest_float("a", 1e-3, 1.0, log=True) for _ in range(400)]
    assert min(floats) >= 1e-3 and max(floats) <= 1.0
    assert 0.3 < sum(value < 10**-1.5 for value in floats) / 400 < 0.7  # half of them, in the logarithm
    assert {draws.suggest_float("a", 0.0, 1.0, step=0.5) for _ in range(60)} == {0.0, 0.5, 1.0}
    assert {draws.suggest_int("a", 1, 7, step=3) for _ in range(60)} == {1, 4, 7}
    assert {draws.suggest_int("a", 1, 3, log=True) for _ in range(90)} == {1, 2, 3}
    assert {draws.suggest_categorical("a", ["x", None]) for _ in range(40)} == {"x", None}
    for bad in (lambda: draws.suggest_float("a", 2, 1), lambda: draws.suggest_float("a", 0, 1, log=True),
                lambda: draws.suggest_int("a", 1, 2, step=0), lambda: draws.suggest_categorical("a", [])):  # fmt: skip
        with pytest.raises(ArgumentRefused):
            bad()


def test_what_is_no_number_is_worse_than_any():
    state = SearchState(({}, {}, {}), 1.0, None, maximise=True, facts={}, costs=())
    for number, score in enumerate((math.nan, -5.0, math.inf)):
        state = state.with_result(number, Result(score, 0))
    assert state.best == 1
