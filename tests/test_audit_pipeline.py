"""The audit of whole runs with sampling: a correct run is as its accountant says, and wrong noise or draws are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, kstest
from torch import Tensor

import hf_dpvision.drawing
from hf_dpvision import DPTrainer, DPTrainingArguments, accounting, clipping
from hf_dpvision.accounting import Event
from hf_dpvision.audit import PipelineAudit, audit_pipeline, probes
from hf_dpvision.audit.directions import refuse_mixed_directions
from hf_dpvision.audit.pipeline import ComposedLoss, lower_bound
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.mechanism import SystemRandomness
from hf_dpvision.noise import NoiseSource
from hf_dpvision.sampling import PoissonSampler


# Draws and noise are the system's: a correct run raises a false alarm once in a million, and with two runs of 984
# canaries each of the faults was seen at p < 1e-12 in all of 100 simulations.
RUNS, STEPS, RATE, SIGMA = 2, 30, 0.1, 0.8


class NoiseAtNineTenths(NoiseSource):
    """Real noise, a tenth too small."""

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        return super().normal(shape, 0.9 * std)


class TooLittle(SystemRandomness):
    """The system's entropy, with noise a tenth too small."""

    def noise_source(self, device: torch.device) -> Callable[[int], NoiseSource]:
        source = NoiseAtNineTenths.from_os_entropy(device)
        return lambda step: source


class HalfAgainAsMany(PoissonSampler):
    """Draws at 1.5 times the sample rate that is accounted for."""

    def __init__(self, key: bytes, dataset_size: int, sample_rate: float, block: int = 1) -> None:
        super().__init__(key, dataset_size, 1.5 * sample_rate, block)


class HalfAgainAsMuch(clipping.Style):
    """Flat clipping that lets half as much again through as it says."""

    def __init__(self, bound: float) -> None:
        self._real, self._said = clipping.Flat(1.5 * bound), bound

    def factors(self, squared_norms: Tensor) -> Tensor:
        return self._real.factors(squared_norms)

    def sensitivity(self) -> float:
        return self._said


def runs(
    folder: Path, randomness: type = SystemRandomness, kind: type[DPTrainer] = DPTrainer, steps: int = STEPS
) -> Iterator[tuple[DPTrainer, np.ndarray]]:
    """The real trainer on the probe, whose weights move; every canary is in by a coin."""
    coins = np.random.default_rng(0)
    for number in range(RUNS):
        present = coins.random(probes.ENTRIES) < 0.5
        present[0] = True
        args = DPTrainingArguments(
            str(folder / str(number)), noise_multiplier=SIGMA, target_delta=1e-5, max_steps=steps, learning_rate=0.1,
            logical_batch_size=round(RATE * probes.ENTRIES), per_device_train_batch_size=256,
            per_sample_max_grad_norm=0.5, optim="sgd", lr_scheduler_type="constant", save_strategy="no",
            logging_strategy="no", use_cpu=True, disable_tqdm=True, self_check=False, accountant="rdp",
        )  # fmt: skip
        yield kind(
            probes.Probe(), args, train_dataset=probes.EntryCanaries(present), randomness=randomness(),
            compute_loss_func=probes.chosen_output,
        ), present  # fmt: skip


@pytest.fixture(scope="module")
def along() -> list[dict[str, Tensor]]:
    """The direction of every canary."""
    return probes.entry_directions(probes.Probe())


def test_a_correct_run_is_as_its_accountant_says(tmp_path: Path, along: list[dict[str, Tensor]]) -> None:
    found = audit_pipeline(runs(tmp_path), along)
    assert not found.distorted and not found.violated
    assert found.present + found.absent == RUNS * probes.ENTRIES and min(found.present, found.absent) > 800
    assert 0.0 <= found.lower_epsilon < found.claimed_epsilon < 9.0 and found.share < 1.0


def test_noise_at_nine_tenths_is_a_distortion(tmp_path: Path, along: list[dict[str, Tensor]]) -> None:
    found = audit_pipeline(runs(tmp_path, TooLittle), along)
    assert found.distorted and found.p_absent < 1e-6


def test_a_wrong_sample_rate_is_a_distortion(
    tmp_path: Path, along: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_dpvision.drawing, "PoissonSampler", HalfAgainAsMany)
    found = audit_pipeline(runs(tmp_path), along)
    assert found.distorted and found.p_present < 1e-6 < found.p_absent  # only those that are in are drawn too often


def test_a_larger_contribution_is_a_distortion(
    tmp_path: Path, along: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DPTrainingArguments, "build_clipping", lambda self: HalfAgainAsMuch(0.5))
    found = audit_pipeline(runs(tmp_path), along)
    assert found.distorted and found.p_present < 1e-6 < found.p_absent


def test_every_entry_of_the_probe_has_a_canary_of_its_own(along: list[dict[str, Tensor]]) -> None:
    refuse_mixed_directions(along)
    probe = probes.Probe()
    assert len(along) == probes.ENTRIES == sum(parameter.numel() for parameter in probe.parameters())
    rows = torch.stack([torch.cat([part.flatten() for part in each.values()]) for each in along])
    assert rows.abs().argmax(1).unique().numel() == probes.ENTRIES and rows.abs().amax(1).min() > 1 - 1e-6
    canaries = probes.EntryCanaries(np.ones(probes.ENTRIES, bool))
    labels = torch.tensor([canaries[i]["labels"] for i in range(probes.ENTRIES)])
    pixels = torch.stack([canaries[i]["pixel_values"] for i in range(probes.ENTRIES)])
    assert probes.chosen_output(probe(pixels), labels).shape == (probes.ENTRIES,)


@pytest.mark.parametrize(("rate", "sigma", "steps"), [(0.1, 0.8, 30), (0.3, 2.0, 100), (0.02, 1.0, 5)])
def test_the_composed_loss_is_that_of_the_accountant(rate: float, sigma: float, steps: int) -> None:
    found = []
    for removing in (True, False):
        loss = ComposedLoss(Event(rate, sigma, steps), removing=removing)
        assert abs(loss.masses.sum() - 1) < 1e-9 and (np.diff(loss.cdf(np.linspace(-20, 20, 99))) >= 0).all()

        def delta_at(epsilon: float, loss: ComposedLoss = loss) -> float:
            return float(np.sum(loss.masses * np.maximum(0.0, -np.expm1(np.minimum(epsilon - loss.losses, 50.0)))))

        found.append(delta_at)
    for delta in (1e-2, 1e-4):
        known = accounting.epsilon(sample_rate=rate, noise_multiplier=sigma, steps=steps, delta=delta)
        deltas = [max(delta_at(epsilon) for delta_at in found) for epsilon in (known.lower - 0.02, known.upper + 0.02)]
        assert deltas[0] >= delta >= deltas[1]


def test_sums_of_drawn_losses_follow_the_composed_distribution() -> None:
    generator, event = np.random.default_rng(1), Event(0.2, 1.0, 20)
    for inside in (True, False):
        taking_part = (generator.random((4000, 20)) < 0.2) * inside
        outputs = taking_part + generator.normal(size=(4000, 20))
        sums = np.log(0.8 + 0.2 * np.exp(outputs - 0.5)).sum(1)  # sigma 1: written out
        loss = ComposedLoss(event, removing=inside)
        assert kstest(sums if inside else -sums, loss.cdf).pvalue > 1e-4


def test_the_lower_bound_holds_its_confidence() -> None:
    generator, repeats, epsilon, delta = np.random.default_rng(2), 200, 1.0, 0.0
    share = np.exp(epsilon) / (1 + np.exp(epsilon))
    above = 0
    for _ in range(repeats):
        present, absent = (generator.random(300) < p for p in (share, 1 - share))
        scores = (group + 0.1 * generator.random(300) for group in (present, absent))  # ties are broken at random
        above += lower_bound(*scores, delta, 0.9) > epsilon
    assert above <= binom.isf(1e-4, repeats, 0.1)


def test_the_lower_bound_is_that_of_clopper_and_pearson_at_the_best_threshold() -> None:
    present, absent = np.array([1.0] * 8 + [0.0] * 2).repeat(20), np.array([0.0] * 9 + [1.0]).repeat(20)
    least, largest = beta.ppf(0.025, 80, 21), beta.ppf(0.975, 11, 90)  # of every second one: 80 and 10 of 100
    below = beta.ppf(0.025, 90, 11), beta.ppf(0.975, 21, 80)
    expected = max(np.log((least - 1e-3) / largest), np.log((below[0] - 1e-3) / below[1]))
    assert lower_bound(present, absent, 1e-3, 0.95) == pytest.approx(expected, rel=1e-9)


def test_the_lower_bound_finds_what_is_there_from_either_side() -> None:
    generator = np.random.default_rng(3)
    shown = np.where(generator.random(2000) < 0.2, 9.0, generator.random(2000))  # in: sometimes shown with certainty
    hidden = generator.random(2000)
    assert lower_bound(shown, hidden, 1e-5, 0.95) > 3.0
    assert lower_bound(-hidden, -shown, 1e-5, 0.95) > 3.0
    assert lower_bound(hidden, generator.random(2000), 1e-5, 0.95) < 0.3
    assert lower_bound(shown, hidden, 0.3, 0.95) == 0.0  # all of it may be delta


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, along: list[dict[str, Tensor]]) -> None:
    with pytest.raises(ArgumentRefused, match="not orthonormal"):
        audit_pipeline(runs(tmp_path), [along[0], along[0]])
    mixed = [next(runs(tmp_path / str(steps), steps=steps)) for steps in (1, 2)]
    with pytest.raises(ArgumentRefused, match="2 different things"):
        audit_pipeline(mixed, along)
    run, present = next(runs(tmp_path / "few", steps=1))
    with pytest.raises(ArgumentRefused, match="Only 0 canaries"):
        audit_pipeline([(run, np.ones_like(present))], along)


def test_verdicts_follow_the_numbers() -> None:
    found = PipelineAudit(3.0, 1e-5, 1.5, 0.95, 1e-3, 0.5, 1e-6, 100, 100)
    assert not found.violated and not found.distorted and found.share == 0.5
    assert replace(found, lower_epsilon=3.1).violated
    assert replace(found, p_absent=4e-7).distorted and not replace(found, p_absent=6e-7).distorted
