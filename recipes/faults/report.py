"""What was tried and what was seen, as lines of the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_dpvision.results import split_at_markers

from .battery import CHECKS, GROUPS, Check
from .fault import Fault
from .findings import ALPHA, Finding


@dataclass(frozen=True)
class Trial:
    """One injected fault.

    Attributes:
        finding: of the check that is named in the table.
        others: names of the other checks that alarmed; None if they were not asked.
    """

    fault: Fault
    finding: Finding
    others: tuple[str, ...] | None


@dataclass
class Record:
    """One run of the script.

    Attributes:
        command: without paths.
        hardware, versions, date: of the run.
        repeats: clean runs of the checks of each group.
        seconds: group -> how long it took.
        trials: in the order of the table.
        alarms: name of a check -> findings of its false alarms.
    """

    command: str
    hardware: str
    versions: dict[str, str]
    date: str
    repeats: int
    seconds: dict[str, float] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    alarms: dict[str, list[Finding]] = field(default_factory=dict)

    @property
    def missed(self) -> list[str]:
        """Faults that their check did not find."""
        return [trial.fault.id for trial in self.trials if not trial.finding.alarm]

    @property
    def failed(self) -> bool:
        """Whether a fault was missed or a clean run alarmed."""
        return bool(self.missed or self.alarms)

    def of_group(self, group: str) -> tuple[list[Trial], list[Check]]:
        """The trials and the checks of a group."""
        trials = [trial for trial in self.trials if CHECKS[trial.fault.check].group == group]
        return trials, [check for check in CHECKS.values() if check.group == group]


def line(trial: Trial) -> str:
    """One fault for the terminal."""
    caught = "caught" if trial.finding.alarm else "MISSED"
    return f"{trial.fault.id:27}{trial.fault.check:26}{caught:8}{trial.finding.value}"


def summary(trials: Sequence[Trial], alarms: int, repeats: int) -> str:
    """The result in one sentence."""
    caught = sum(trial.finding.alarm for trial in trials)
    return f"{caught} of {len(trials)} faults caught, {alarms} alarms in {repeats} clean repeats"


def write(path: Path, record: Record) -> None:
    """Put the sections of the groups that were run into the report, replacing earlier ones."""
    if not path.exists():
        path.write_text(INTRODUCTION, encoding="utf-8")
    for group in record.seconds:
        begin, end = f"<!-- {group}: written by the run, do not edit -->", f"<!-- end of {group} -->"
        before, _, after = split_at_markers(path, begin, end)
        path.write_text(f"{before}{begin}\n{section(record, group)}\n{end}{after}", encoding="utf-8")


def section(record: Record, group: str) -> str:
    """What the report says of one group."""
    trials, checks = record.of_group(group)
    alarms = sum(len(record.alarms.get(check.name, [])) for check in checks)
    software = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    chance = record.repeats * sum(check.rate for check in checks)
    return "\n".join([
        f"## {GROUPS[group]}",
        "",
        f"**{summary(trials, alarms, record.repeats)}.** `{record.command}`, {record.date}, "
        f"{record.seconds[group] / 60:.1f} minutes,",
        f"{record.hardware}, {software}.",
        f"False alarms expected in all clean repeats together: {chance:.1e}.",
        "",
        *table(_FAULT_HEAD, (_fault_row(trial) for trial in trials)),
        "",
        *table(_CHECK_HEAD, (_check_row(record, check) for check in checks)),
    ])  # fmt: skip


INTRODUCTION = f"""# Fault injection

Written by `recipes/fault_injection.py`, which fails if a fault is missed or a clean run alarms. Every
fault replaces one part of the real `DPTrainer` (a rule, a clipping style, a sampler, a noise source, the
ledger, a method) on tiny models; the named check, which knows nothing of it, has to alarm.

A statistical check alarms below p = {ALPHA:g}, which is its false-alarm rate; p-values are corrected for
the number of comparisons inside a check (Bonferroni). The others compare numbers that are the same in every
correct run, up to rounding.

Where it was seen: FD fastDP, FL FlashDP's review code, OP Opacus, PV private_vision, PT
private-transformers, DPT dp-transformers. An empty cell is a fault that is only plausible. Other alarms:
how many other checks of the same section saw it; empty where they were not asked (`--short`).

"""

_FAULT_HEAD = ("fault", "what is wrong", "seen in", "check", "caught", "p-value or deviation", "other alarms")
_CHECK_HEAD = ("check", "what must hold", "false-alarm rate", "alarms in clean repeats", "only check to see")


def _fault_row(trial: Trial) -> Sequence[str]:
    fault, others = trial.fault, "" if trial.others is None else str(len(trial.others))
    caught = "yes" if trial.finding.alarm else "**no**"
    return f"`{fault.id}`", fault.what, fault.seen_in, f"`{fault.check}`", caught, trial.finding.value, others


def _check_row(record: Record, check: Check) -> Sequence[str]:
    rate = f"{check.rate:g}" if check.rate else "0, deterministic"
    alone = [f"`{t.fault.id}`" for t in record.trials if t.fault.check == check.name and t.others == ()]
    return f"`{check.name}`", check.what, rate, str(len(record.alarms.get(check.name, []))), ", ".join(alone)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
