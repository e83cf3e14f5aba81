"""Break the mechanism on purpose, in every way we know of, and see whether the checks notice.

    python recipes/fault_injection.py    # every fault, every check, 60 clean repeats; writes fault_injection.md
    python recipes/fault_injection.py --short --report /dev/stdout
    python recipes/fault_injection.py --only noise-98 clip-off --repeats 0 --report /dev/stdout

A fault replaces one part of a run of the real `DPTrainer`: a rule, a clipping style, a sampler, a source of noise, the
keeper of the ledger, a method of the trainer or of its mechanism; where there is no such seam, a function is patched
inside a `with` block. The check that the table of faults names has to alarm; it sees only what the run releases,
reads and writes. Then runs without any fault are looked at by all checks, none of which may alarm. Draws and noise
are the real ones, from the operating system. Exit code 1: a fault was missed, or a clean run alarmed.

Faults are listed in faults/faults_*.py, checks in faults/checks_*.py; the last full report is fault_injection.md.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from faults.battery import CHECKS
from faults.fault import Fault
from faults.lab import Lab
from faults.parts import Parts
from faults.report import Record, Trial, line, markdown, summary
from faults.table import FAULTS
from transformers.utils import logging as transformers_logging

from hf_dpvision.results import environment


REPEATS, SHORT_REPEATS = 60, 2


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, no warnings about tiny data, and nothing that is there already is searched for garbage."""
    package = logging.getLogger("hf_dpvision")
    before = torch.get_num_threads(), package.level, transformers_logging.get_verbosity()
    torch.set_num_threads(1)
    package.setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    gc.collect()
    gc.freeze()  # every run of a trainer collects garbage; this makes that fast
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before[0])
        package.setLevel(before[1])
        transformers_logging.set_verbosity(before[2])


def attempt(fault: Fault, *, every_check: bool) -> Trial:
    """Inject one fault and ask its check, and all others if wanted."""
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(fault.inject(Parts()), Path(folder))
        finding = CHECKS[fault.check](lab)
        if not every_check:
            return Trial(fault, finding, None)
        others = (name for name, check in CHECKS.items() if name != fault.check and check(lab).alarm)
        return Trial(fault, finding, tuple(others))


def clean(record: Record) -> None:
    """Ask all checks about a run without a fault."""
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Parts(), Path(folder))
        for name, check in CHECKS.items():
            finding = check(lab)
            if finding.alarm:
                record.alarms.setdefault(name, []).append(finding)
                print(f"FALSE ALARM of {name} in clean repeat {record.repeats + 1}: {finding.value}", flush=True)
    record.repeats += 1


def investigate(faults: Sequence[Fault], repeats: int, command: str, *, every_check: bool) -> Record:
    """Try these faults, then so many clean repeats, and print what is seen."""
    begun = time.monotonic()
    with quiet():
        hardware, versions = environment()
        record = Record(command, hardware, versions, date.today().isoformat())
        for fault in faults:
            record.trials.append(attempt(fault, every_check=every_check))
            print(line(record.trials[-1]), flush=True)
        for _ in range(repeats):
            clean(record)
    record.seconds = time.monotonic() - begun
    print(summary(record), flush=True)
    return record


def main(command_line: Sequence[str] | None = None, faults: Sequence[Fault] = FAULTS) -> Record:
    """Run as told on the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help=f"only the named checks, {SHORT_REPEATS} clean repeats")
    parser.add_argument("--repeats", type=int, help=f"clean repeats, {REPEATS} by default")
    parser.add_argument("--only", nargs="+", metavar="ID", choices=[fault.id for fault in faults], help="these faults")
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args(command_line)
    repeats = options.repeats if options.repeats is not None else SHORT_REPEATS if options.short else REPEATS
    chosen = [fault for fault in faults if options.only is None or fault.id in options.only]
    command = "python recipes/fault_injection.py" + (" --short" if options.short else "")
    record = investigate(chosen, repeats, command, every_check=not options.short)
    options.report.write_text(markdown(record), encoding="utf-8")
    return record


if __name__ == "__main__":
    sys.exit(main().failed)
