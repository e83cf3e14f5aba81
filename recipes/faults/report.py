"""What was tried and what was seen, as lines of the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .battery import CHECKS
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
        seconds: it took.
        trials: in the order of the table.
        repeats: clean runs of the whole battery.
        alarms: name of a check -> findings of its false alarms.
    """

    command: str
    hardware: str
    versions: dict[str, str]
    date: str
    seconds: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    repeats: int = 0
    alarms: dict[str, list[Finding]] = field(default_factory=dict)

    @property
    def missed(self) -> list[str]:
        """Faults that their check did not find."""
        return [trial.fault.id for trial in self.trials if not trial.finding.alarm]

    @property
    def failed(self) -> bool:
        """Whether a fault was missed or a clean run alarmed."""
        return bool(self.missed or self.alarms)


def line(trial: Trial) -> str:
    """One fault for the terminal."""
    caught = "caught" if trial.finding.alarm else "MISSED"
    return f"{trial.fault.id:27}{trial.fault.check:26}{caught:8}{trial.finding.value}"


def summary(record: Record) -> str:
    """The result in one sentence."""
    caught = len(record.trials) - len(record.missed)
    alarms = sum(map(len, record.alarms.values()))
    return f"{caught} of {len(record.trials)} faults caught, {alarms} alarms in {record.repeats} clean repeats"


def markdown(record: Record) -> str:
    """The whole report."""
    software = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    chance = record.repeats * sum(check.rate for check in CHECKS.values())
    return "\n".join([
        "# Fault injection",
        "",
        "Written by `recipes/fault_injection.py`, which fails if a fault is missed or a clean run alarms. Every",
        "fault replaces one part of the real `DPTrainer` (a rule, a clipping style, a sampler, a noise source, the",
        "ledger, a method) on two tiny models; the named check, which knows nothing of it, has to alarm.",
        "",
        f"**{summary(record)}.** `{record.command}`, {record.date}, {record.seconds / 60:.1f} minutes,",
        f"{record.hardware}, {software}.",
        "",
        f"A statistical check alarms below p = {ALPHA:g}, which is its false-alarm rate; p-values are corrected for",
        "the number of comparisons inside a check (Bonferroni). The others compare numbers that are the same in every",
        f"correct run, up to rounding. False alarms expected in all clean repeats together: {chance:.1e}.",
        "",
        "## Faults",
        "",
        *table(_FAULT_HEAD, (_fault_row(trial) for trial in record.trials)),
        "",
        "Where it was seen: FD fastDP, FL FlashDP's review code, OP Opacus, PV private_vision, PT",
        "private-transformers, DPT dp-transformers. An empty cell is a fault that is only plausible. Other alarms:",
        "how many other checks saw it; empty where they were not asked (`--short`).",
        "",
        "## Checks",
        "",
        *table(("check", "what must hold", "false-alarm rate", "alarms in clean repeats", "only check to see"),
               (_check_row(record, name) for name in CHECKS)),
        "",
    ])  # fmt: skip


_FAULT_HEAD = ("fault", "what is wrong", "seen in", "check", "caught", "p-value or deviation", "other alarms")


def _fault_row(trial: Trial) -> Sequence[str]:
    fault, others = trial.fault, "" if trial.others is None else str(len(trial.others))
    caught = "yes" if trial.finding.alarm else "**no**"
    return f"`{fault.id}`", fault.what, fault.seen_in, f"`{fault.check}`", caught, trial.finding.value, others


def _check_row(record: Record, name: str) -> Sequence[str]:
    check = CHECKS[name]
    rate = f"{check.rate:g}" if check.rate else "0, deterministic"
    alone = [f"`{t.fault.id}`" for t in record.trials if t.fault.check == name and t.others == ()]
    return f"`{name}`", check.what, rate, str(len(record.alarms.get(name, []))), ", ".join(alone)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
