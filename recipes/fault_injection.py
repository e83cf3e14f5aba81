"""Break the mechanism on purpose, in every way we know of, and see whether the checks notice.

    python recipes/fault_injection.py    # every fault, every check, 60 clean repeats; writes fault_injection.md
    python recipes/fault_injection.py --groups units shards
    python recipes/fault_injection.py --short --report short.md
    python recipes/fault_injection.py --only noise-98 clip-off --repeats 0 --report some.md

A fault replaces one part of a run of the real `DPTrainer`: a rule, a clipping style, a sampler, a source of noise, the
keeper of the ledger, a method of the trainer or of its mechanism; where there is no such seam, a function is patched
inside a `with` block. The check that the table of faults names has to alarm; it sees only what the run releases,
reads and writes. Then runs without any fault are looked at by all checks, none of which may alarm. Draws and noise
are the real ones, from the operating system. Exit code 1: a fault was missed, or a clean run alarmed.

Checks and their faults come in groups, by the kind of run that is looked at: single examples in one process, units of
several examples, streams, and a model in shards over two processes. Each group has a section of the report, which is
replaced when the group is run. A fault is asked about by the checks of its group.

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
from faults.battery import CHECKS, GROUPS, Check
from faults.fault import Fault
from faults.lab import Lab
from faults.parts import Parts
from faults.report import Record, Trial, line, summary, write
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
        asked = [check for check in of_group(CHECKS[fault.check].group) if check.name != fault.check]
        others = (check.name for check in asked if check(lab).alarm)
        return Trial(fault, finding, tuple(others))


def of_group(group: str) -> list[Check]:
    """The checks of a group."""
    return [check for check in CHECKS.values() if check.group == group]


def clean(record: Record, group: str, number: int) -> None:
    """Ask all checks of a group about a run without a fault."""
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Parts(), Path(folder))
        for check in of_group(group):
            finding = check(lab)
            if finding.alarm:
                record.alarms.setdefault(check.name, []).append(finding)
                print(f"FALSE ALARM of {check.name} in clean repeat {number + 1}: {finding.value}", flush=True)


def investigate(
    faults: Sequence[Fault], repeats: int, command: str, *, every_check: bool, groups: Sequence[str] = tuple(GROUPS)
) -> Record:
    """Try those of the faults that are of these groups, with so many clean repeats of each, and print what is seen."""
    with quiet():
        hardware, versions = environment()
        record = Record(command, hardware, versions, date.today().isoformat(), repeats)
        for group in groups:
            begun = time.monotonic()
            for fault in (each for each in faults if CHECKS[each.check].group == group):
                record.trials.append(attempt(fault, every_check=every_check))
                print(line(record.trials[-1]), flush=True)
            for number in range(repeats):
                clean(record, group, number)
            record.seconds[group] = time.monotonic() - begun
    print(summary(record.trials, sum(map(len, record.alarms.values())), repeats), flush=True)
    return record


def main(command_line: Sequence[str] | None = None, faults: Sequence[Fault] = FAULTS) -> Record:
    """Run as told on the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help=f"only the named checks, {SHORT_REPEATS} clean repeats")
    parser.add_argument("--repeats", type=int, help=f"clean repeats, {REPEATS} by default")
    parser.add_argument("--only", nargs="+", metavar="ID", choices=[fault.id for fault in faults], help="these faults")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="all by default")
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args(command_line)
    repeats = options.repeats if options.repeats is not None else SHORT_REPEATS if options.short else REPEATS
    chosen = [fault for fault in faults if options.only is None or fault.id in options.only]
    of_chosen = {CHECKS[fault.check].group for fault in chosen} if options.only else GROUPS
    groups = options.groups or [group for group in GROUPS if group in of_chosen]
    told = ["python", "recipes/fault_injection.py", *(["--short"] if options.short else [])]
    told += ["--groups", *options.groups] if options.groups else []
    told += ["--repeats", str(repeats)] if options.repeats is not None else []
    record = investigate(chosen, repeats, " ".join(told), every_check=not options.short, groups=groups)
    write(options.report, record)
    return record


if __name__ == "__main__":
    sys.exit(main().failed)
