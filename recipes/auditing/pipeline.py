"""Whole runs, audited from within: sampling, clipping and noise together, against the accountant's distribution."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_dpvision.audit import PipelineAudit, audit_pipeline, probes
from hf_dpvision.sampling import PoissonSampler

from .faults import CORRECT, HALVED, NEARLY, Fault, TenPercentLoose, TenPercentMore, quiet_trainer


STEPS, BATCH, SIGMA = 50, 98, 1.0
ERROR_RATE, CONFIDENCE = 1e-6, 0.95
# of a run: noise so small that even a bound that assumes nothing contradicts the claim
NEARLY_NONE = Fault("noise x 0.1", noise=0.1, cost=10.0)
TIGHT = Fault("noise x 0.97", noise=0.97, cost=1 / 0.97)
LOOSE = Fault("clipped at 1.1 C", arguments=TenPercentLoose, cost=1.1)
OFTEN = Fault("sample rate x 1.1", sampler=TenPercentMore)


def audited(fault: Fault, runs: int) -> PipelineAudit:
    """Audit so many runs with a fault or none; every canary is in by a coin, anew in each of them."""
    coins = np.random.default_rng()

    def made() -> Iterator[tuple]:
        for _ in range(runs):
            present = coins.random(probes.ENTRIES) < 0.5
            present[0] = True  # the trainer looks at it
            with tempfile.TemporaryDirectory() as folder:
                yield quiet_trainer(
                    Path(folder), probes.Probe(), probes.EntryCanaries(present), fault, loss=probes.chosen_output,
                    noise_multiplier=SIGMA, logical_batch_size=BATCH, max_steps=STEPS, learning_rate=0.1,
                    per_device_train_batch_size=256, accountant="prv",
                ), present  # fmt: skip

    with fault.drawing():
        return audit_pipeline(
            made(), probes.entry_directions(probes.Probe()), error_rate=ERROR_RATE, confidence=CONFIDENCE
        )


@dataclass(frozen=True)
class PipelineSeries:
    """The runs of one fault, and what is due."""

    fault: Fault
    runs: int
    found: PipelineAudit
    seconds: float

    @property
    def correct(self) -> bool:
        """Whether nothing is wrong."""
        return (self.fault.cost, self.fault.sampler) == (1.0, PoissonSampler)

    def check(self) -> None:
        """Raise if a correct mechanism was suspected, or a fault missed.

        Raises:
            RuntimeError: the audit did not find what is the case.
        """
        due = (not self.correct, self.fault is NEARLY_NONE)
        if self.found.distorted != due[0] or (self.found.violated and self.correct) or self.found.violated < due[1]:
            raise RuntimeError(
                f"whole runs, {self.fault.name}: distorted {self.found.distorted}, contradicted "
                f"{self.found.violated}, where {due[0]} and {due[1]} are due: {self.found}"
            )

    def row(self) -> str:
        """A row of the table."""
        found = self.found
        return (
            f"| {self.fault.name} | {self.runs} | {found.present:,} | {found.absent:,} | {found.p_present:.1e} | "
            f"{found.p_absent:.1e} | {'**no**' if found.distorted else 'yes'} | {found.lower_epsilon:.2f} | "
            f"{found.claimed_epsilon:.2f} | {found.share:.2f} | {'yes' if found.violated else 'no'} | "
            f"{self.seconds / self.runs:.1f} s |"
        )


def pipeline_series(runs: int) -> Iterator[PipelineSeries]:
    """All audits of whole runs, checked."""
    plan = [(CORRECT, runs), *((fault, max(1, runs // 4)) for fault in (NEARLY, HALVED, NEARLY_NONE))]
    plan += [(fault, max(1, runs // 2)) for fault in (TIGHT, LOOSE, OFTEN)]
    for fault, count in plan:
        started = time.monotonic()
        series = PipelineSeries(fault, count, audited(fault, count), time.monotonic() - started)
        print(series.row(), flush=True)
        series.check()
        yield series


def pipeline_report(found: Sequence[PipelineSeries]) -> list[str]:
    """The section of the report about whole runs."""
    return [
        "## Whole runs, from within",
        "",
        f"{STEPS} steps, sample rate {BATCH / probes.ENTRIES:.4f}, sigma {SIGMA:g}, learning rate 0.1; every one of "
        f"the {probes.ENTRIES} entries of a convolution and a linear layer has a canary whose clipped gradient is "
        "that entry, in with probability 1/2. From the released mean gradients each canary's log-likelihood ratios "
        "are added up over the steps; the sums of those that are in, and of those that are not, are compared with the "
        "accountant's privacy loss of the whole run (Kolmogorov-Smirnov). A correct run is called distorted with "
        f"probability {ERROR_RATE:g}, the lower bound (Clopper-Pearson, half of the sums choose the threshold) is "
        f"wrong with probability {1 - CONFIDENCE:.2g}. The comparison decides; the bound, which assumes nothing of "
        "the distribution, is weak, and it is the comparison alone that finds a tenth too much or too little. Draws "
        "without replacement hardly change a single canary's sum: the checks of draws in "
        "[fault injection](fault_injection.md) see those.",
        "",
        "| mechanism | runs | sums, in | sums, out | p, in | p, out | as accounted | lower bound, "
        f"{CONFIDENCE:.0%} | claimed | bound / claim | claim contradicted | time of a run |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- | ---: |",
        *(series.row() for series in found),
        "",
    ]
