"""One training run of a recipe, audited as `hf-dpvision audit` does it."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hf_dpvision import DPTrainer
from hf_dpvision.accounting.claim import round_down, round_up
from hf_dpvision.audit import Finding, audit_run, plot


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Audited:
    """What one run showed: with how many examples beside the canaries, and how long it took."""

    finding: Finding
    examples: int
    seconds: float


@dataclass(frozen=True)
class Training:
    """A recipe that offers its trainer.

    Attributes:
        title: of the section.
        factory: `file:function` as the command line takes it.
        make: the function.
        arguments: handed to it.
        told: how they read in the report, where no folder of this machine is to stand.
        canaries: how many.
        what: what is trained, in a sentence.
    """

    title: str
    factory: str
    make: Callable[[str, list[str]], DPTrainer]
    arguments: Sequence[str]
    told: Sequence[str]
    canaries: int
    what: str

    def audited(self) -> Audited:
        """Insert canaries and train once."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.make(folder, list(self.arguments))
            examples = len(trainer.train_dataset)
            finding = audit_run(trainer, self.canaries, CONFIDENCE)
        return Audited(finding, examples, time.monotonic() - started)

    @property
    def command(self) -> str:
        """What does the same by itself."""
        given = ["--", *self.told] if self.told else []
        return shlex.join(["hf-dpvision", "audit", "--canaries", str(self.canaries), self.factory, *given])


def training_report(training: Training, audited: Audited, picture: Path | None) -> list[str]:
    """The section of the report about one training run; draws the picture.

    Raises:
        RuntimeError: the claim is contradicted.
    """
    finding = audited.finding
    if finding.violated:
        raise RuntimeError(f"{training.factory}: the claim is contradicted, or this audit errs: {finding}")
    lines = [
        f"## {training.title}",
        "",
        f"`{training.command}`: {training.what} Mislabelled examples, each in with probability 1/2, are guessed by "
        "how far their loss fell. Weak by nature: half the noise would hardly show.",
        "",
        f"| examples | canaries | in | best of the guesses | right | lower bound, {finding.confidence:.0%} | claimed, "
        f"delta = {finding.delta:g} | verdict | time |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
        f"| {audited.examples:,} | {finding.canaries:,} | {finding.included:,} | {finding.guesses:,} | "
        f"{finding.right:,} | {round_down(finding.lower)} | {round_up(finding.claimed)} | no violation detected | "
        f"{audited.seconds / 60:.1f} min |",
        "",
    ]
    if picture is None or find_spec("matplotlib") is None:
        return lines
    plot.draw(finding, picture)
    return [*lines, f"![scores of the canaries, and the bounds]({picture.name})", ""]
