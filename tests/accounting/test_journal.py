"""The ledger on disk has every step before it is taken, and shows any change that was made to it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from hf_dpvision.accounting import Event
from hf_dpvision.accounting.journal import FILE, FOLDER, Journal, Mark, read_journal
from hf_dpvision.errors import LedgerError, LedgerRefused


FACTS = {"sample_rate": 0.1, "noise_multiplier": 2.0}


def opened(folder: Path, facts: dict = FACTS) -> Journal:
    journal = Journal(folder)
    journal.start(facts, privacy_unit="example", neighboring_relation="zero-out")
    return journal


def written(folder: Path, steps: int = 3) -> Path:
    """A journal of so many steps; return its file."""
    journal = opened(folder)
    for _ in range(steps):
        journal.charge(0.1, 2.0)
    journal.close()
    return folder / FOLDER / FILE


def test_a_step_is_on_disk_when_charge_returns(tmp_path):
    journal = opened(tmp_path)
    for steps in range(1, 4):
        journal.charge(0.1, 2.0)
        history = read_journal(tmp_path)
        assert history.ledger.events == (Event(0.1, 2.0, steps),)
        assert history.contains(journal.mark) and history.steps_before[-1] == steps
    journal.close()


def test_it_is_synchronised_before_charge_returns(tmp_path, monkeypatch):
    journal, synchronised = opened(tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronised.append(os.fstat(descriptor).st_size))
    journal.charge(0.1, 2.0)
    assert synchronised == [(tmp_path / FOLDER / FILE).stat().st_size]


def test_a_later_call_continues_and_may_change_the_mechanism(tmp_path):
    written(tmp_path)
    journal = opened(tmp_path, {"sample_rate": 0.2, "noise_multiplier": 1.0})
    journal.charge(0.2, 1.0)
    journal.close()
    history = read_journal(tmp_path)
    assert history.ledger.events == (Event(0.1, 2.0, 3), Event(0.2, 1.0, 1))
    assert [facts["sample_rate"] for facts in history.calls] == [0.1, 0.2]


def test_only_public_facts_are_written(tmp_path):
    records = [json.loads(line) for line in written(tmp_path).read_text().splitlines()]
    assert [record["kind"] for record in records] == ["run", "train", "step", "step", "step"]
    assert all(set(record) == {"kind", "sample_rate", "noise_multiplier", "chain"} for record in records[2:])
    assert set(records[0]) == {
        "kind", "format", "version", "run_id", "privacy_unit", "neighboring_relation", "chain",
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [FILE, "lock"]


@pytest.mark.parametrize("line", range(5))
@pytest.mark.parametrize("change", ["edit", "remove", "repeat", "space", "key"])
def test_a_changed_line_is_refused(tmp_path, line, change):
    path = written(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    if change == "edit":
        lines[line] = lines[line].replace('"kind"', '"kind2"') if line == 0 else lines[line].replace("2.0", "3.0")
    elif change == "remove":
        del lines[line]
    elif change == "repeat":
        lines.insert(line, lines[line])
    elif change == "space":
        lines[line] = lines[line].replace(": ", ":", 1)
    else:
        lines[line] = lines[line].replace("{", '{"more": 1, ', 1)
    path.write_text("".join(lines))
    if change == "remove" and line == 4:
        assert read_journal(tmp_path).ledger.steps == 2  # what is cut off whole is seen by a checkpoint's mark
        return
    with pytest.raises(LedgerRefused, match="cannot be trusted"):
        read_journal(tmp_path)
    with pytest.raises(LedgerRefused, match="cannot be trusted"):
        Journal(tmp_path)


@pytest.mark.parametrize("content", ["", "\n", "[]\n", '{"kind": "step"}\n', "no json", '{"kind": ["run"]}\n'])
def test_a_file_that_is_no_ledger_is_refused(tmp_path, content):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / FILE).write_text(content)
    with pytest.raises(LedgerRefused, match="cannot be trusted"):
        read_journal(tmp_path)


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_torn_last_line_counts_as_spent_and_is_made_whole(tmp_path, left):
    path = written(tmp_path)
    *before, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + last[:left])
    assert read_journal(tmp_path).ledger.steps == 3
    journal = opened(tmp_path)
    journal.charge(0.1, 2.0)
    journal.close()
    history = read_journal(tmp_path)
    assert history.ledger.steps == 4 and history.torn_at is None and history.contains(journal.mark)


def test_longer_rubbish_at_the_end_counts_as_one_step(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0" * 5000)
    opened(tmp_path).close()
    assert read_journal(tmp_path).ledger.steps == 4


def test_another_run_or_a_shortened_file_does_not_contain_a_mark(tmp_path):
    path = written(tmp_path / "a")
    lines = path.read_bytes().splitlines(keepends=True)
    journal = opened(tmp_path / "a")
    journal.close()
    assert read_journal(tmp_path / "a").contains(journal.mark)
    path.write_bytes(b"".join(lines[:-1]))
    assert not read_journal(tmp_path / "a").contains(journal.mark)
    written(tmp_path / "b", steps=9)
    assert not read_journal(tmp_path / "b").contains(journal.mark)
    assert not read_journal(tmp_path / "b").contains(Mark(read_journal(tmp_path / "b").run_id, 0, ""))


def test_a_full_disk_ends_the_journal_and_the_torn_step_stays_charged(tmp_path, monkeypatch):
    journal = opened(tmp_path)
    journal.charge(0.1, 2.0)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:10]))
    with pytest.raises(LedgerError, match="Make room"):
        journal.charge(0.1, 2.0)
    monkeypatch.undo()
    with pytest.raises(LedgerError, match="closed"):
        journal.charge(0.1, 2.0)
    journal.close()
    opened(tmp_path).close()
    assert read_journal(tmp_path).ledger.steps == 2


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    with pytest.raises(LedgerError, match="could not be made ready"):
        Journal(tmp_path)


def test_a_second_trainer_is_refused_with_the_process_id(tmp_path):
    journal = opened(tmp_path)
    assert (tmp_path / FOLDER / "lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(LedgerRefused, match=f"process {os.getpid()}"):
        Journal(tmp_path)
    journal.close()
    opened(tmp_path).close()


def _hold(folder: Path, ready: multiprocessing.Event) -> None:
    opened(folder)
    ready.set()
    signal.pause()


def test_a_killed_process_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(LedgerRefused, match=f"process {process.pid}"):
        Journal(tmp_path)
    process.kill()
    process.join()
    opened(tmp_path).close()
