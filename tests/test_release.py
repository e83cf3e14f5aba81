"""Only what is on the list may leave; what callbacks and trackers hear holds nothing of the training data."""

from __future__ import annotations

import json
import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from trainer_cases import Images, Linear, trainer
from transformers import TrainerCallback
from transformers.integrations import ClearMLCallback, DagsHubCallback, MLflowCallback, WandbCallback
from transformers.utils.hub import PushInProgress

from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.guards_tracking import refuse_uploading_trackers
from hf_dpvision.release import forbidden_files, released_files, unexpected_files


MAY_LEAVE = (
    "README.md", "privacy.json", "privacy/ledger.jsonl", "config.json", "model.safetensors", "LICENSE", "NOTICE.txt",
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
    "adapter_config.json", "preprocessor_config.json", "processor_config.json", ".gitattributes",
    "report.html", "report.png",
)  # fmt: skip
LEFT_BY_TRAINER = (
    "training_args.bin", "trainer_state.json", "train_results.json", "eval_results.json", "all_results.json",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "checkpoint-4/model.safetensors",
    "checkpoint-4/rng_state.pth", "checkpoint-4/iterate.safetensors", "report-private.html", "report-private.png",
    "runs/Nov25/events.out.tfevents.1.host.0", "privacy/lock", "_push-x/config.json",
)  # fmt: skip
UNEXPECTED = (
    "notes.txt", "predictions.csv", "gradients.safetensors", "model.bin", "pytorch_model.bin", "other/config.json",
    "other/adapter_model.safetensors", "README.md.bak", "my_model.safetensors", "iterate.safetensors",
    "model-1-of-2.safetensors", "privacy.txt", "report.pdf", "other/report.html",
)  # fmt: skip


def test_every_file_is_allowed_or_forbidden_and_only_strange_ones_are_unexpected(tmp_path):
    for name in (*MAY_LEAVE, *LEFT_BY_TRAINER, *UNEXPECTED, ".git/config", ".cache/huggingface/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert released_files(tmp_path) == sorted(MAY_LEAVE)
    assert forbidden_files(tmp_path) == sorted((*LEFT_BY_TRAINER, *UNEXPECTED))
    assert unexpected_files(tmp_path) == sorted(UNEXPECTED)


def test_a_trained_folder_has_no_unexpected_file_and_its_useful_ones_may_leave(tmp_path):
    run = trainer(tmp_path, seed=None, save_strategy="steps", save_steps=2, eval_dataset=Images(8))
    run.save_metrics("train", run.train().metrics)
    run.save_metrics("eval", run.evaluate())
    run.save_model()
    run.save_state()
    run.create_model_card()
    assert unexpected_files(tmp_path) == []
    wanted = ["README.md", "config.json", "model.safetensors", "privacy.json", "privacy/ledger.jsonl"]
    assert released_files(tmp_path) == wanted and len(forbidden_files(tmp_path)) > 10


def ready_to_push(folder: Path, **changes: Any):
    """A trainer that pushes, and cannot reach any Hub: the tests are offline."""
    run = trainer(folder, Linear(), seed=None, save_strategy="steps", save_steps=2, **changes)
    run.args.push_to_hub, run.hub_model_id, run.push_in_progress = True, "tester/linear", None
    return run


def test_a_push_that_fails_in_the_background_is_told_and_training_goes_on(tmp_path, caplog):
    run = ready_to_push(tmp_path)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert run.state.global_step == 4 and "An upload to the Hub failed" in caplog.text
    assert not list(tmp_path.glob("_push-*"))


def test_while_a_push_is_going_on_others_fall_out_but_not_that_of_the_last_step(tmp_path, monkeypatch):
    run, slow, pushed = ready_to_push(tmp_path, max_steps=6), Future(), []
    run.push_in_progress = PushInProgress([slow])

    def uploaded(staging, *_):
        pushed.append(json.loads((Path(staging.name) / "privacy.json").read_text())["steps"])
        staging.cleanup()
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(run, "_finish_current_push", lambda: slow.done() or slow.set_result(None))
    monkeypatch.setattr(run, "_upload", uploaded)
    run.train()
    assert pushed == [6]


def test_a_push_that_was_asked_for_and_fails_raises(tmp_path, caplog):
    run = ready_to_push(tmp_path)
    (tmp_path / "notes.txt").write_text("from Monday")
    with pytest.raises(Exception, match="offline"), caplog.at_level(logging.WARNING):
        run.push_to_hub()
    assert "Not uploaded" in caplog.text and "notes.txt" in caplog.text
    assert not list(tmp_path.glob("_push-*"))


class Listener(TrainerCallback):
    """Keeps everything that a tracker could send."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append(dict(logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.heard.append(dict(metrics))

    on_predict = on_evaluate


def test_callbacks_hear_nothing_of_the_training_data(tmp_path):
    listener = Listener()
    run = trainer(tmp_path, Linear(), callbacks=[listener], logging_steps=1, eval_dataset=Images(8))
    run.train()
    heard = len(listener.heard)
    result = run.predict(run.train_dataset)
    assert "test_loss" in result.metrics and len(listener.heard) == heard
    run.predict(Images(8))
    assert len(listener.heard) == heard + 1
    allowed = {
        "epsilon", "epoch", "learning_rate", "grad_norm", "train_runtime", "train_samples_per_second",
        "train_steps_per_second", "test_loss", "test_runtime", "test_samples_per_second", "test_steps_per_second",
        "test_model_preparation_time", "test_metrics_are_private",
    }  # fmt: skip
    assert heard == 5 and {name for logs in listener.heard for name in logs} <= allowed


def test_private_metrics_are_marked_wherever_they_are_heard(tmp_path):
    for data, marked in (("private", True), ("public", False)):
        listener = Listener()
        run = trainer(tmp_path / data, Linear(), callbacks=[listener], eval_data=data)
        heard = [run.evaluate({"a": Images(8), "b": Images(9)}), run.predict(Images(8)).metrics]
        heard += [*listener.heard, *run.state.log_history]
        assert len(heard) == 2 + 5 + 2
        for metrics in heard:
            names = {name.removesuffix("_loss") for name in metrics if name.endswith("_loss")}
            assert names and all((f"{name}_metrics_are_private" in metrics) is marked for name in names)


def test_the_card_never_shows_metrics_of_other_weights(tmp_path):
    run = trainer(tmp_path, Linear(), seed=None, eval_data="public", eval_dataset=Images(8), max_steps=2)
    run.evaluate()
    run.create_model_card()
    assert "| loss |" in (tmp_path / "README.md").read_text()
    run.train()
    run.create_model_card()
    assert "No evaluation is recorded" in (tmp_path / "README.md").read_text()
    value = run.evaluate()["eval_loss"]
    run.create_model_card()
    assert f"| loss | {value:.4f} |" in (tmp_path / "README.md").read_text()


def test_of_the_best_checkpoint_the_card_shows_its_own_metrics(tmp_path):
    run = trainer(
        tmp_path, seed=None, eval_data="public", eval_dataset=Images(8), load_best_model_at_end=True, max_steps=4,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=1.0,
    )  # fmt: skip
    run.train()
    run.create_model_card()
    best = min(logs["eval_loss"] for logs in run.state.log_history if "eval_loss" in logs)
    assert f"| loss | {best:.4f} |" in (tmp_path / "README.md").read_text()
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def silent(tracker: type[TrainerCallback]) -> TrainerCallback:
    """A tracker whose package is not installed, so that it can neither start nor end anything."""
    nothing = {name: lambda self: None for name in ("__init__", "__del__")}
    return type(tracker.__name__, (tracker,), nothing)()


@pytest.mark.parametrize(
    ("tracker", "variable", "value", "refused"),
    [
        (WandbCallback, "WANDB_LOG_MODEL", "checkpoint", True),
        (WandbCallback, "WANDB_LOG_MODEL", "false", False),
        (WandbCallback, "WANDB_WATCH", "gradients", True),
        (WandbCallback, "WANDB_WATCH", "all", True),
        (WandbCallback, "WANDB_WATCH", "parameters", False),
        (MLflowCallback, "HF_MLFLOW_LOG_ARTIFACTS", "1", True),
        (MLflowCallback, "WANDB_WATCH", "all", False),
        (DagsHubCallback, "HF_DAGSHUB_LOG_ARTIFACTS", "True", True),
        (ClearMLCallback, "CLEARML_LOG_MODEL", None, True),
        (ClearMLCallback, "CLEARML_LOG_MODEL", "FALSE", False),
    ],
)
def test_a_tracker_that_would_upload_files_or_gradients_is_refused(tmp_path, tracker, variable, value, refused):
    callback = silent(tracker)
    environment = {} if value is None else {variable: value}
    run = trainer(tmp_path, Linear())
    if refused:
        with pytest.raises(ArgumentRefused, match=variable):
            refuse_uploading_trackers([TrainerCallback(), callback], run.args, environment)
        run.args.disable_dp = True
    refuse_uploading_trackers([TrainerCallback(), callback], run.args, environment)


def test_trackers_are_looked_at_before_training(tmp_path, monkeypatch):
    run = trainer(tmp_path, Linear())
    run.callback_handler.callbacks.append(silent(WandbCallback))
    monkeypatch.setenv("WANDB_WATCH", "gradients")
    with pytest.raises(ArgumentRefused, match="before they are clipped"):
        run.train()
    assert run._run.ledger.steps == 0
