"""Killed at any place of a step, a run is resumed, and its epsilon covers every noise vector that it ever drew."""

from __future__ import annotations

import json
import multiprocessing
import signal
from multiprocessing.context import BaseContext

import pytest
from killed_run import PLACES, STEPS, live

from hf_dpvision import accounting
from hf_dpvision.accounting.journal import read_journal


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """Children of a process that has imported the package and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_dpvision.trainer"])
    return context


def lives(processes: BaseContext, *args) -> int:
    """Run one life to its end; return the exit code."""
    process = processes.Process(target=live, args=args)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_is_resumed_with_new_noise_and_nothing_forgotten(processes, tmp_path, place):
    folder, log = tmp_path / "run", tmp_path / "noise"
    late = 1 if "save" in place else 4
    assert lives(processes, folder, log, place, 1, False) == -signal.SIGKILL
    assert lives(processes, folder, log, place, late, True) == -signal.SIGKILL
    assert lives(processes, folder, log, "never", 0, True) == 0
    drawn = [line.split() for line in log.read_text().splitlines()]
    digests = [digest for _, digest in drawn]
    assert len(set(digests)) == len(digests)
    steps = sum(dimensions == "2" for dimensions, _ in drawn)  # the weight's noise; the bias has one dimension
    spent = read_journal(folder).ledger
    assert STEPS <= steps <= spent.steps
    assert spent.steps <= steps + 2  # at most the step in which it died is charged without its noise
    said = json.loads((folder / f"checkpoint-{STEPS}" / "privacy.json").read_text())
    true = accounting.epsilon(sample_rate=1 / 8, noise_multiplier=1.0, steps=steps, delta=1e-4, accountant="rdp")
    assert said["guarantee"]["epsilon"] >= true.upper and said["steps"] == spent.steps
