"""Audit the mechanism: what an attacker who sees a step can show of epsilon, for a correct run and for faulty ones.

    python recipes/audit.py                                # 20 repetitions, minutes on one core; writes audit.md
    python recipes/audit.py --repetitions 2 --steps 50 --report /dev/stdout

Canary gradients of known direction go through the real `DPTrainer`, in one run all of them, in the other one none, and
the interval for mu, how far the two lie apart, is compared with the claim (hf_dpvision/audit/step.py). Repeated with
the right noise, with half of it, and with other faults that are put in from outside. Then one canary in a small vision
transformer, along its whole gradient. Then the audit of the digits recipe in one training run, as `hf-dpvision audit`
does it. Last, by how much a single clipped contribution exceeds its bound by rounding, and what noise costs.

Fails, and writes no report, if a correct run is contradicted or a violation is missed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from logging import getLogger
from pathlib import Path

import torch
from finetune_image_classification import audited_trainer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_dpvision import DPTrainer, DPTrainingArguments, clipping
from hf_dpvision.audit import Finding, StepAudit, audit_run, audit_step, gradient_direction, probes
from hf_dpvision.audit.rounding import clipping_excess
from hf_dpvision.errors import DataRefused
from hf_dpvision.mechanism import SystemRandomness
from hf_dpvision.noise import NoiseSource
from hf_dpvision.progress import ClaimAtStart
from hf_dpvision.secure_noise import SecureNoiseSource


CONFIDENCE = 0.95  # that all repetitions together hold
CLIP_NORM, DELTA = 0.5, 1e-5
CANARY = 1  # of the pictures
ALLOWED_EXCESS = 1e-4


class ScaledNoise(NoiseSource):
    """Real noise, made larger or smaller than was asked for."""

    factor = 1.0

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        return super().normal(shape, std * self.factor)


class ScaledRandomness(SystemRandomness):
    """The operating system's entropy, with noise of another size."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def noise_source(self, device: torch.device) -> Callable[[int], NoiseSource]:
        source = ScaledNoise.from_os_entropy(device)
        source.factor = self.factor
        return lambda step: source


class Loose(clipping.Style):
    """Flat clipping that lets `times` as much through as it says."""

    def __init__(self, max_norm: float, times: float) -> None:
        self._real, self._said = clipping.Flat(times * max_norm), max_norm

    def factors(self, squared_norms: Tensor) -> Tensor:
        return self._real.factors(squared_norms)

    def sensitivity(self) -> float:
        return self._said


class LooseArguments(DPTrainingArguments):
    """Arguments whose clipping lets half as much again through."""

    def build_clipping(self) -> Loose:
        return Loose(self.per_sample_max_grad_norm, 1.5)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a mechanism.

    Attributes:
        name: for the report.
        noise: size of the noise, as a share of what is claimed.
        arguments: the class of the trainer's arguments.
        cost: mu as a multiple of what is claimed; 1 for a correct mechanism.
    """

    name: str
    noise: float = 1.0
    arguments: type[DPTrainingArguments] = DPTrainingArguments
    cost: float = 1.0


CORRECT, HALVED = Fault("correct"), Fault("noise halved", noise=0.5, cost=2.0)
OTHERS = (
    Fault("noise x 0.9", noise=0.9, cost=1 / 0.9),
    Fault("clipped at 1.5 C", arguments=LooseArguments, cost=1.5),
    Fault("noise x 1.1", noise=1.1, cost=1 / 1.1),
)


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
    """The real trainer, all examples in every step, noise multiplier 1, with a fault or none."""
    args = fault.arguments(
        str(folder), noise_multiplier=1.0, target_delta=DELTA, logical_batch_size=len(examples), max_steps=steps,
        per_device_train_batch_size=len(examples), per_sample_max_grad_norm=CLIP_NORM, learning_rate=0.0,
        lr_scheduler_type="constant", optim="sgd", save_strategy="no", logging_strategy="no", use_cpu=True,
        disable_tqdm=True, self_check=False, accountant="rdp",
    )  # fmt: skip
    made = DPTrainer(
        model, args, train_dataset=examples, compute_loss_func=loss, randomness=ScaledRandomness(fault.noise)
    )
    for telling in (PrinterCallback, ClaimAtStart):
        made.pop_callback(telling)
    return made


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


def mechanism_series(repetitions: int, steps: int) -> Iterator[Series]:
    """All audits of the mechanism, checked."""
    probe, transformer = "Dirac canaries, conv and linear", "one canary, ViT of two blocks"
    plan = [(probe, audit_probe, CORRECT, steps, repetitions), (probe, audit_probe, HALVED, steps, repetitions)]
    plan += [(probe, audit_probe, fault, steps, max(1, repetitions // 4)) for fault in OTHERS]
    plan += [(transformer, audit_transformer, fault, 10 * steps, 1) for fault in (CORRECT, HALVED)]
    for what, audit, fault, length, count in plan:
        started = time.monotonic()
        audits = tuple(repeated(audit, fault, length, count, (1 - CONFIDENCE) / repetitions))
        series = Series(what, fault, audits, time.monotonic() - started)
        series.check()
        yield series


def mechanism_report(found: Sequence[Series], repetitions: int) -> list[str]:
    """The section of the report about the mechanism."""
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


def single_run_report(finding: Finding, seconds: float) -> list[str]:
    """The section of the report about one training run of a recipe."""
    verdict = "VIOLATION" if finding.violated else "no violation detected"
    return [
        "## One training run of the digits recipe",
        "",
        "`hf-dpvision audit recipes/finetune_image_classification.py:audited_trainer`: mislabelled pictures, each in "
        "with probability 1/2, guessed by how far their loss fell. Weak by nature: half the noise would hardly show.",
        "",
        "| canaries | in | best of the guesses | right | lower bound, 95 % | claimed | verdict | time |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
        f"| {finding.canaries} | {finding.included} | {finding.guesses} | {finding.right} | {finding.lower:.3f} | "
        f"{finding.claimed:.3f} | {verdict} | {seconds / 60:.1f} min |",
        "",
    ]


def convolutions() -> nn.Module:
    """Convolutions with a stride and with groups, GroupNorm, a linear layer; pictures `[n, 3, 16, 16]`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, groups=4),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 7 * 7, 2),
    )  # fmt: skip


def per_example_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, `[n]`."""
    outputs = model(batch["pixel_values"])
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def rounding_report(pictures: int = 16) -> list[str]:
    """The section of the report about rounding: the largest excess over the bound, over random pictures."""
    rows = []
    for name, build in (("ViT of two blocks", tiny_vit), ("convolutions", convolutions)):
        for precision, autocast in (("float32", None), ("bfloat16 autocast", torch.bfloat16)):
            for passes in (1, 2):
                found = [
                    max(_excesses(build(), pictures, rule, passes, autocast))
                    for rule in ("auto", "mixed", "ghost", "instantiate")
                ]
                if max(found) >= ALLOWED_EXCESS:
                    raise RuntimeError(f"{name}, {precision}, {passes} passes: a contribution is {max(found)} over C")
                cells = (name, precision, str(passes), *(f"{one:+.1e}" for one in found))
                rows.append(f"| {' | '.join(cells)} |")
    return [
        "## Rounding",
        "",
        f"The largest of (norm of one clipped contribution / C - 1) over {pictures} random pictures, faint to "
        "glaring, each with C at 0.9 and at 0.01 of its norm; negative where all stay below. Required: less than "
        f"{ALLOWED_EXCESS:g}.",
        "",
        "| model | precision | backward passes | auto | mixed | ghost | instantiate |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
    ]


def _excesses(
    model: nn.Module, pictures: int, rule: str, passes: int, autocast: torch.dtype | None
) -> Iterator[float]:
    generator = torch.Generator().manual_seed(1)
    for number in range(pictures):
        pixels = torch.randn(1, 3, 16, 16, generator=generator) * 10.0 ** (number % 4 - 2)
        example = {"pixel_values": pixels, "labels": torch.tensor([number % 2])}
        yield clipping_excess(
            model, per_example_loss, example, norm_rule=rule, backward_passes=passes, autocast=autocast
        )


def noise_report(draws: int = 20_000_000) -> list[str]:
    """The section of the report about the speed of noise on one thread."""
    rows = []
    for name, source in (("default", NoiseSource.from_os_entropy()), ("secure_noise", SecureNoiseSource())):
        source.normal((draws // 10,), 1.0)
        started = time.process_time()  # of this one thread, whatever else the machine does
        source.normal((draws,), 1.0)
        rate = draws / (time.process_time() - started)
        rows.append(f"| {name} | {source.algorithm} | {rate / 1e6:.0f} | {86e6 / rate:.1f} s |")
    return [
        "## Speed of noise",
        "",
        "| source | generator | million draws a CPU second | a step of ViT-B, 86 million parameters |",
        "| --- | --- | ---: | ---: |",
        *rows,
        "",
    ]


def software() -> str:
    """Versions, for the report."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "scipy"))


def main(command_line: Sequence[str] | None = None) -> None:
    """Run the audits as told on the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repetitions", type=int, default=20, help="of the correct run, and with half the noise")
    parser.add_argument("--steps", type=int, default=100, help="of each run; 60 canaries give as many values a step")
    parser.add_argument("--canaries", type=int, default=400, help="in the digits recipe; 0 leaves that audit out")
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args(command_line)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    getLogger("hf_dpvision").setLevel("ERROR")  # it tells of every run how little so few examples are protected
    lines = [
        "# Audit",
        "",
        f"Written by `recipes/audit.py`, which fails if a correct run is contradicted or a fault missed. "
        f"One thread, {software()}.",
        "",
        *mechanism_report(list(mechanism_series(options.repetitions, options.steps)), options.repetitions),
    ]
    if options.canaries:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            finding = audit_run(audited_trainer(folder, []), options.canaries)
        lines += single_run_report(finding, time.monotonic() - started)
    lines += [*rounding_report(), *noise_report()]
    options.report.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
