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

    def audited(self) -> tuple[Finding, float]:
        """Insert canaries, train once, and return what was found, and the seconds it took."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            finding = audit_run(self.make(folder, list(self.arguments)), self.canaries, CONFIDENCE)
        return finding, time.monotonic() - started

    @property
    def command(self) -> str:
        """What does the same by itself."""
        given = ["--", *self.told] if self.told else []
        return shlex.join(["hf-dpvision", "audit", "--canaries", str(self.canaries), self.factory, *given])


def training_report(training: Training, finding: Finding, seconds: float, picture: Path | None) -> list[str]:
    """The section of the report about one training run; draws the picture.

    Raises:
        RuntimeError: the claim is contradicted.
    """
    if finding.violated:
        raise RuntimeError(f"{training.factory}: the claim is contradicted, or this audit errs: {finding}")
    lines = [
        f"## {training.title}",
        "",
        f"`{training.command}`: {training.what} Mislabelled examples, each in with probability 1/2, are guessed by "
        "how far their loss fell. Weak by nature: half the noise would hardly show.",
        "",
        f"| canaries | in | best of the guesses | right | lower bound, {finding.confidence:.0%} | claimed, delta = "
        f"{finding.delta:g} | verdict | time |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
        f"| {finding.canaries:,} | {finding.included:,} | {finding.guesses:,} | {finding.right:,} | "
        f"{round_down(finding.lower)} | {round_up(finding.claimed)} | no violation detected | "
        f"{seconds / 60:.1f} min |",
        "",
    ]
    if picture is None or find_spec("matplotlib") is None:
        return lines
    plot.draw(finding, picture)
    return [*lines, f"![scores of the canaries, and the bounds]({picture.name})", ""]
