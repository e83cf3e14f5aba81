"""A stream given to the trainer is trained on exactly like the same rows by index, and nothing of it is left over."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from launching import TORCHRUN, launched_once
from torch.utils.data import IterableDataset as TorchIterableDataset
from trainer_cases import Images, trainer, weights
from transformers import TrainerCallback

from hf_dpvision.accounting.journal import read_journal
from hf_dpvision.data import Columns, ImageStream, shards
from hf_dpvision.errors import ArgumentRefused, DataRefused
from hf_dpvision.mechanism import SystemRandomness
from hf_dpvision.model_card import write_model_card
from hf_dpvision.statement import write_statement
from hf_dpvision.verify import verify_folder
from hf_dpvision.windows import folder_of


STEPS = 10
WAYS = ("materialise", "windows")
FEATURES = Features(pixel_values=List(List(List(Value("float32")))), labels=Value("int64"))


def rows(count: int = 64, wrong_label_at: int | None = None):
    images = Images(64)
    for index in range(count):
        label = 99 if index == wrong_label_at else int(images.labels[index])
        yield {"pixel_values": images.pixels[index].numpy(), "labels": label}


def stream(**changes) -> IterableDataset:
    """The pictures of `Images`, one after the other."""
    return IterableDataset.from_generator(rows, gen_kwargs=changes, features=FEATURES)


def run_on(folder: Path, dataset, **changes):
    settings = {"max_steps": STEPS, "train_dataset_size": 64, "stream_window_steps": 4}
    return trainer(folder, train_dataset=dataset, **settings | changes)


def trained(folder: Path, dataset, **changes) -> torch.Tensor:
    run = run_on(folder, dataset, **changes)
    run.train()
    return weights(run.model)


@pytest.fixture(scope="module")
def by_index(tmp_path_factory) -> torch.Tensor:
    """The weights after training on the same pictures by index."""
    return trained(tmp_path_factory.mktemp("by-index"), Images(64))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_training_on_a_stream_is_training_by_index(tmp_path, by_index, way, workers):
    ours = trained(tmp_path, stream(), stream_sampling=way, dataloader_num_workers=workers)
    assert torch.equal(ours, by_index)
    assert read_journal(tmp_path).ledger.steps == STEPS
    assert [path.name for path in tmp_path.iterdir()] == ["privacy"]  # no row of the stream is left


def test_two_processes_train_on_a_stream_like_one_by_index(tmp_path_factory, by_index):
    worker = Path(__file__).with_name("stream_worker.py")
    launched = launched_once(tmp_path_factory, "streams", TORCHRUN, worker)
    assert launched.code == 0, launched.stderr[-3000:]
    for way in WAYS:
        both = [torch.load(launched.folder / f"{way}-{rank}.pt") for rank in (0, 1)]
        assert torch.equal(*both) and (both[0] - by_index).norm() < 1e-6 * by_index.norm()
        assert json.loads((launched.folder / f"{way}-0.json").read_text()) == {"world": 2, "left": []}


class StopAfter(TrainerCallback):
    """Ends training by an exception behind a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 4, 6])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_ended_is_resumed_like_one_by_index(tmp_path, by_index, way, step):
    settings = {"stream_sampling": way, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run_on(tmp_path, stream(), **settings, callbacks=[StopAfter(step)]).train()
    run = run_on(tmp_path, stream(), **settings)
    run.train(resume_from_checkpoint=True)
    # the step that was ended was charged and lost: it is taken again with another draw and other noise
    assert run.state.global_step == STEPS and run.epsilon().upper > 0
    assert read_journal(tmp_path).ledger.steps == STEPS + 1
    assert not (tmp_path / "stream").exists()


def test_a_resumed_run_reads_its_window_from_the_disk(tmp_path):
    settings = {"stream_sampling": "windows", "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run_on(tmp_path, stream(), **settings, callbacks=[StopAfter(5)]).train()
    left = [path.name for path in (tmp_path / "stream").glob("window-*")]
    assert left == [folder_of(tmp_path, 4).name]
    before = (tmp_path / "stream" / left[0] / "progress.json").stat()

    class Look(TrainerCallback):
        seen = None

        def on_step_begin(self, args, state, control, **kwargs):
            if self.seen is None:
                self.seen = [p.name for p in (tmp_path / "stream").glob("window-*")]

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                assert (tmp_path / "stream" / left[0] / "progress.json").stat().st_mtime_ns == before.st_mtime_ns

    look = Look()
    run_on(tmp_path, stream(), **settings, callbacks=[look]).train(resume_from_checkpoint=True)
    assert look.seen == left


@pytest.mark.parametrize("way", WAYS)
def test_another_number_of_rows_than_declared_is_refused_with_nothing_charged(tmp_path, way):
    run = run_on(tmp_path, stream(count=60), stream_sampling=way)
    with pytest.raises(DataRefused, match="60 rows and 64 were declared"):
        run.train()
    history = read_journal(tmp_path)
    assert history is None or history.ledger.steps == 0


def test_rows_are_counted_where_they_are_kept_and_have_to_be_declared_elsewhere(tmp_path):
    run = run_on(tmp_path / "a", stream(), train_dataset_size=None, stream_sampling="materialise")
    run.train()
    assert run.privacy_statement()["sampling"]["dataset_size"] == 64
    with pytest.raises(DataRefused, match="train_dataset_size"):
        run_on(tmp_path / "b", stream(), train_dataset_size=None, stream_sampling="windows").train()


def test_materialised_rows_stay_in_a_folder_that_was_named_and_serve_another_run(tmp_path, by_index):
    named = {"stream_dir": str(tmp_path / "kept"), "stream_sampling": "materialise"}
    trained(tmp_path / "a", stream(), **named)
    told = shards.Progress.read(tmp_path / "kept" / "rows")
    assert told.complete
    assert torch.equal(trained(tmp_path / "b", stream(), **named), by_index)
    assert (tmp_path / "kept" / "rows" / "progress.json").exists()


def test_rows_of_another_stream_in_the_named_folder_are_refused(tmp_path):
    named = {"stream_dir": str(tmp_path / "kept"), "stream_sampling": "materialise"}
    trained(tmp_path / "a", stream(), **named)
    with pytest.raises(DataRefused, match="rows of another stream"):
        run_on(tmp_path / "b", IterableDataset.from_generator(reversed_rows, features=FEATURES), **named).train()


def reversed_rows():
    yield from list(rows())[::-1]


def test_sigterm_in_the_middle_of_a_pass_ends_the_run_to_be_resumed(tmp_path, monkeypatch):
    passes, keep = [], shards.keep_rows

    def terminating(*args):
        passes.append(args)
        if len(passes) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return keep(*args)

    monkeypatch.setattr(shards, "keep_rows", terminating)
    settings = {"stream_sampling": "windows", "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(SystemExit) as ended:
        run_on(tmp_path, stream(), **settings).train()
    assert ended.value.code == 128 + signal.SIGTERM
    assert read_journal(tmp_path).ledger.steps == 4  # those of the first window
    run_on(tmp_path, stream(), **settings).train(resume_from_checkpoint=True)
    assert read_journal(tmp_path).ledger.steps == STEPS


def test_a_stream_of_another_library_is_refused_with_the_way_out(tmp_path):
    class Endless(TorchIterableDataset):
        def __iter__(self):
            return iter(rows())

    with pytest.raises(DataRefused, match="datasets.IterableDataset"):
        run_on(tmp_path, Endless()).train()


def test_evaluating_on_the_stream_that_is_trained_on_is_refused(tmp_path):
    one = stream()
    run = trainer(tmp_path, train_dataset=one, eval_dataset=one, max_steps=2, train_dataset_size=64)
    with pytest.raises(ArgumentRefused, match="eval_dataset is the training set"):
        run.train()


def test_a_label_outside_the_classes_is_named_by_its_row_before_anything_is_charged(tmp_path):
    images = ImageStream(stream(wrong_label_at=40), Columns("pixel_values", "labels"), lambda picture: picture)
    for way in WAYS:
        with pytest.raises(DataRefused, match="label of example 40.*99"):
            run_on(tmp_path / way, images, stream_sampling=way).train()
        history = read_journal(tmp_path / way)
        assert history is None or history.ledger.steps == 0


@pytest.mark.parametrize(("way", "said"), [("materialise", "materialised"), ("windows", "windows")])
def test_statement_and_ledger_say_how_the_stream_was_read_and_verify_compares_them(tmp_path, way, said):
    run = run_on(tmp_path / "run", stream(), stream_sampling=way, randomness=SystemRandomness())
    run.train()
    released = tmp_path / "released"
    (released / "privacy").mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "privacy" / "ledger.jsonl", released / "privacy")
    statement = run.privacy_statement()
    assert statement["sampling"]["rows"] == said
    write_statement(released, statement)
    write_model_card(released, statement, model_name="streamed")
    assert not verify_folder(released, ("prv",)).findings
    statement["sampling"]["rows"] = "indexed"
    write_statement(released, statement)
    write_model_card(released, statement, model_name="streamed")
    (finding,) = verify_folder(released, ("prv",)).findings
    assert finding.field == "sampling.rows"


@pytest.mark.parametrize("name", ["train_dataset_size", "stream_window_steps"])
def test_a_count_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(ArgumentRefused, match=name):
        run_on(tmp_path, stream(), **{name: 0})


def test_without_privacy_the_same_rows_are_drawn(tmp_path):
    ours = [
        trained(tmp_path / str(number), dataset, disable_dp=True, noise_multiplier=None, target_delta=None)
        for number, dataset in enumerate((stream(), Images(64)))
    ]
    assert torch.equal(*ours)


def test_a_plain_data_set_of_the_same_rows_gives_the_same(tmp_path, by_index):
    indexed = Dataset.from_generator(rows, features=FEATURES, cache_dir=str(tmp_path / "cache")).with_format("torch")
    assert torch.equal(trained(tmp_path / "run", indexed), by_index)


@pytest.mark.parametrize("name", ["privacy_unit_column", "id_column"])
def test_units_of_a_stream_are_refused(tmp_path, name):
    with pytest.raises(DataRefused, match=f"{name}='labels'.*a stream, in which the rows of one unit"):
        run_on(tmp_path, stream(), **{name: "labels"}).train()


def test_a_folder_that_another_training_uses_is_refused(tmp_path):
    named = {"stream_dir": str(tmp_path / "kept")}

    class Second(TrainerCallback):
        refused = None

        def on_step_end(self, args, state, control, **kwargs):
            if self.refused is None:
                with pytest.raises(DataRefused, match="in use by another training") as refusal:
                    run_on(tmp_path / "b", stream(), **named).train()
                self.refused = refusal

    second = Second()
    run_on(tmp_path / "a", stream(), callbacks=[second], **named).train()
    assert second.refused is not None
    run_on(tmp_path / "b", stream(), **named).train()  # and free again


def test_rows_of_other_columns_in_the_named_folder_are_refused_and_stay(tmp_path):
    named = {"stream_dir": str(tmp_path / "kept"), "stream_sampling": "materialise"}
    trained(tmp_path / "a", stream(), **named)
    other = stream().rename_column("labels", "label")
    with pytest.raises(DataRefused, match="rows of another stream.*columns"):
        run_on(tmp_path / "b", other, **named).train()
    assert shards.Progress.read(tmp_path / "kept" / "rows").complete
