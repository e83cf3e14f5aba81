"""One step, audited from within: the separation of releases with and without canaries."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification

from hf_dpvision import DPTrainer
from hf_dpvision.audit import StepAudit, audit_step, gradient_direction, probes
from hf_dpvision.errors import DataRefused

from .faults import CORRECT, DELTA, HALVED, LOOSE, MORE, NEARLY, Fault, quiet_trainer


CONFIDENCE = 0.95  # that all repetitions together hold
CANARY = 1  # of the pictures


class Pictures(Dataset):
    """Four random pictures of two classes; the canary among them may be zeroed out."""

    def __init__(self, present: bool) -> None:
        self.present = present
        self.pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        if index == CANARY and not self.present:
            raise DataRefused("The canary is zeroed out.")
        return {"pixel_values": self.pixels[index], "labels": index % 2}


def tiny_vit() -> ViTForImageClassification:
    """Two blocks, without dropout; the same weights at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=2, **sizes))


def trainer(
    folder: Path,
    model: nn.Module,
    examples: Dataset,
    fault: Fault,
    steps: int,
    loss: Callable[..., Tensor] | None = None,
) -> DPTrainer:
    """All examples in every step, noise multiplier 1, learning rate 0."""
    return quiet_trainer(
        folder, model, examples, fault, loss=loss, noise_multiplier=1.0, logical_batch_size=len(examples),
        per_device_train_batch_size=len(examples), max_steps=steps, learning_rate=0.0, accountant="rdp",
    )  # fmt: skip


def audit_probe(fault: Fault, steps: int, error_rate: float) -> StepAudit:
    """One repetition with the Dirac canaries."""
    with tempfile.TemporaryDirectory() as root:
        both = [
            trainer(
                Path(root) / str(present), probes.Probe(), probes.DiracCanaries(present), fault, steps,
                probes.chosen_output,
            )
            for present in (True, False)
        ]  # fmt: skip
        return audit_step(*both, probes.directions(probes.Probe()), error_rate=error_rate)


def audit_transformer(fault: Fault, steps: int, error_rate: float) -> StepAudit:
    """One repetition with one canary, along its own gradient in a vision transformer."""
    with tempfile.TemporaryDirectory() as root:
        both = [trainer(Path(root) / str(p), tiny_vit(), Pictures(p), fault, steps) for p in (True, False)]
        example = Pictures(True)[CANARY]
        batch = {"pixel_values": example["pixel_values"][None], "labels": torch.tensor([example["labels"]])}
        model = tiny_vit().train()
        direction = gradient_direction(both[0].per_sample_loss(model, batch), model)
        return audit_step(*both, [direction], error_rate=error_rate)


def repeated(
    audit: Callable[[Fault, int, float], StepAudit], fault: Fault, steps: int, repetitions: int, error_rate: float
) -> Iterator[StepAudit]:
    """Audit with this fault so often, telling each result."""
    for number in range(repetitions):
        found = audit(fault, steps, error_rate)
        print(
            f"{fault.name} {number + 1}/{repetitions}: epsilon at least {found.lower_epsilon:.3f}, "
            f"claimed {found.claimed_epsilon:.3f}",
            flush=True,
        )
        yield found


@dataclass(frozen=True)
class Series:
    """The repetitions of one audit with one fault."""

    what: str
    fault: Fault
    audits: tuple[StepAudit, ...]
    seconds: float

    def check(self) -> None:
        """Raise if a correct run was contradicted, or a violation missed.

        Raises:
            RuntimeError: the audit did not find what is the case.
        """
        violated, blunt = (sum(getattr(a, name) for a in self.audits) for name in ("violated", "blunt"))
        expected = (len(self.audits) if self.fault.cost > 1 else 0, len(self.audits) if self.fault.cost < 1 else 0)
        if (violated, blunt) != expected:
            raise RuntimeError(
                f"{self.what}, {self.fault.name}: {violated} violations and {blunt} findings of too much noise in "
                f"{len(self.audits)} repetitions, where {expected[0]} and {expected[1]} are due"
            )

    def row(self) -> str:
        """A row of the table."""
        lowers = sorted(audit.lower_epsilon for audit in self.audits)
        first = self.audits[0]
        return (
            f"| {self.what} | {self.fault.name} | {len(self.audits)} | {first.claimed_epsilon:.3f} | "
            f"{lowers[0]:.3f} | {lowers[len(lowers) // 2]:.3f} | {lowers[-1]:.3f} | "
            f"{sum(a.violated for a in self.audits)} | {sum(a.blunt for a in self.audits)} | "
            f"{first.found.values:,} | {self.seconds / len(self.audits):.1f} s |"
        )


def step_series(repetitions: int, steps: int) -> Iterator[Series]:
    """All audits of the mechanism, checked."""
    probe, transformer = "Dirac canaries, conv and linear", "one canary, ViT of two blocks"
    plan = [(probe, audit_probe, CORRECT, steps, repetitions), (probe, audit_probe, HALVED, steps, repetitions)]
    plan += [(probe, audit_probe, fault, steps, max(1, repetitions // 4)) for fault in (NEARLY, LOOSE, MORE)]
    plan += [(transformer, audit_transformer, fault, 10 * steps, 1) for fault in (CORRECT, HALVED)]
    for what, audit, fault, length, count in plan:
        started = time.monotonic()
        audits = tuple(repeated(audit, fault, length, count, (1 - CONFIDENCE) / repetitions))
        series = Series(what, fault, audits, time.monotonic() - started)
        series.check()
        yield series


def step_report(found: Sequence[Series], repetitions: int) -> list[str]:
    """The section of the report about single steps."""
    each = 1 - (1 - CONFIDENCE) / repetitions
    return [
        "## One step, from within",
        "",
        f"Sampling rate 1, sigma 1, delta {DELTA:g}; epsilon of one step. Either end of each interval holds with "
        f"probability {each:.2%}, so that all {repetitions} repetitions hold together with {CONFIDENCE:.0%}: a "
        "correct run must lie below the claim in all of them, and one with half the noise above. The true epsilon of "
        "a correct run is the claim, so that a tight audit at a lower confidence would exceed it now and then.",
        "",
        "| audit | mechanism | repetitions | claimed | lower bound, least | median | most | violations found | "
        "too much noise found | values a run | time each |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(series.row() for series in found),
        "",
    ]
