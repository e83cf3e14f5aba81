"""The audits keep their error rates, let a correct run pass, and catch faults of the mechanism.

Long, because each audit is tried on a correct mechanism and on every fault that it has to find.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import binom, nct
from torch import Tensor
from trainer_cases import Images, Linear, arguments, trainer

from hf_dpvision import DPTrainer, DPTrainingArguments, cli, clipping, plots
from hf_dpvision.audit import audit_run, audit_step, epsilon_lower_bound, inspection, p_value, probes
from hf_dpvision.audit.canaries import with_canaries
from hf_dpvision.audit.inspection import Finding
from hf_dpvision.audit.separation import NoncentralT, separation
from hf_dpvision.audit.single_run import best_guesses
from hf_dpvision.audit.step import StepAudit
from hf_dpvision.errors import ArgumentRefused, DataRefused
from hf_dpvision.mechanism import FixedRandomness
from hf_dpvision.noise import NoiseSource


# Seeds are fixed, so that no test fails by chance; with other seeds, each finding would be wrong so often.
ERROR_RATE = 1e-4
STEPS = 100


# One step, from within


class ScaledNoise(NoiseSource):
    """Noise of another size than was asked for."""

    factor = 1.0

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        return super().normal(shape, std * self.factor)


class ScaledRandomness(FixedRandomness):
    """Repeatable randomness whose noise has another size; the seed is that of the trainer."""

    def __init__(self, seed: int, factor: float) -> None:
        super().__init__(seed)
        object.__setattr__(self, "factor", factor)

    def noise_source(self, device: torch.device) -> Callable[[int], NoiseSource]:
        source = ScaledNoise.for_tests(self.seed, device)
        source.factor = self.factor
        return lambda step: source


class TwiceTheBound(clipping.Style):
    """Flat clipping that lets twice as much through as it says."""

    def __init__(self, max_norm: float) -> None:
        self._real = clipping.Flat(2 * max_norm)
        self._said = max_norm

    def factors(self, squared_norms: Tensor) -> Tensor:
        return self._real.factors(squared_norms)

    def sensitivity(self) -> float:
        return self._said


def probe_trainer(folder: Path, present: bool, factor: float = 1.0, seed: int = 0) -> DPTrainer:
    """The real trainer on the probe, all examples in every step, noise multiplier 1."""
    examples = probes.DiracCanaries(present)
    args = arguments(
        folder / str(present), logical_batch_size=len(examples), per_device_train_batch_size=len(examples),
        max_steps=STEPS, learning_rate=0.0, per_sample_max_grad_norm=0.5, target_delta=1e-5, logging_strategy="no",
    )  # fmt: skip
    return DPTrainer(
        probes.Probe(),
        args,
        train_dataset=examples,
        compute_loss_func=probes.chosen_output,
        randomness=ScaledRandomness(2 * seed + present, factor),
    )


def audited(folder: Path, factor: float = 1.0) -> StepAudit:
    both = (probe_trainer(folder, present, factor) for present in (True, False))
    return audit_step(*both, probes.directions(probes.Probe()), error_rate=ERROR_RATE)


def test_the_audit_of_a_correct_step_is_close_below_the_claim(tmp_path: Path) -> None:
    found = audited(tmp_path)
    assert found.claimed_epsilon == pytest.approx(4.377178, abs=1e-4)
    assert 3.8 < found.lower_epsilon < found.claimed_epsilon
    assert not found.violated and not found.blunt
    assert found.found.values == STEPS * 60


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_too_little_noise_is_a_violation(tmp_path: Path, factor: float) -> None:
    found = audited(tmp_path, factor)
    assert found.violated and found.lower_epsilon > found.claimed_epsilon


def test_too_much_noise_is_found_by_the_other_side(tmp_path: Path) -> None:
    found = audited(tmp_path, 1.1)
    assert found.blunt and not found.violated


def test_a_clipping_that_lets_twice_the_bound_through_is_a_violation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DPTrainingArguments, "build_clipping", lambda self: TwiceTheBound(0.5))
    assert audited(tmp_path).violated


def test_no_noise_at_all_is_infinite(tmp_path: Path) -> None:
    still = np.zeros((5, 2))
    assert separation(still + 1.0, still, 0.01).lower == math.inf
    assert separation(still, still, 0.01).lower == 0.0


def test_canary_gradients_are_longer_than_the_bound_and_orthonormal() -> None:
    rows = torch.stack([torch.cat([p.flatten() for p in each.values()]) for each in probes.directions(probes.Probe())])
    assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 2e-6
    touched = {name for each in probes.directions(probes.Probe()) for name, p in each.items() if p.abs().max() > 0.9}
    assert touched == {"conv.weight", "conv.bias", "head.weight", "head.bias"}


def test_directions_that_mix_a_learning_rate_and_sampling_are_refused(tmp_path: Path) -> None:
    one = probes.directions(probes.Probe())[0]
    pair = [probe_trainer(tmp_path, present) for present in (True, False)]
    with pytest.raises(ArgumentRefused, match="not orthonormal"):
        audit_step(*pair, [one, one])
    with pytest.raises(ArgumentRefused, match="no canary"):
        audit_step(*pair, [])
    pair[0].args.learning_rate = 0.1
    with pytest.raises(ArgumentRefused, match="learning_rate=0.1"):
        audit_step(*pair, [one])
    sampled = [probe_trainer(tmp_path / "sampled", present) for present in (True, False)]
    for each in sampled:
        each.args.logical_batch_size, each.args.max_steps = 30, 2
    with pytest.raises(ArgumentRefused, match="sampling rate"):
        audit_step(*sampled, [one])


@pytest.mark.parametrize("freedom", [8, 20, 12_000])
@pytest.mark.parametrize("noncentrality", [0.0, 3.0, 50.0])
def test_the_noncentral_t_distribution_equals_scipys_where_that_answers(freedom: int, noncentrality: float) -> None:
    for t in noncentrality + np.array([-2.0, 0.0, 1.0, 4.0]):
        expected = nct.cdf(t, freedom, noncentrality)
        assert NoncentralT(freedom).cdf(t, noncentrality) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 5.0])
def test_either_end_of_the_interval_is_wrong_as_often_as_stated(mu: float) -> None:
    generator, repeats, error_rate = np.random.default_rng(1), 500, 0.05
    wrong = np.zeros(2)
    for _ in range(repeats):
        absent = generator.normal(size=(6, 2)) + [3.0, -1.0]
        found = separation(generator.normal(size=(6, 2)) + [3.0 + mu, mu - 1.0], absent, error_rate)
        wrong += [found.lower > mu, found.upper < mu]
    most = binom.isf(1e-4, repeats, error_rate)
    assert (wrong <= most).all() and (wrong >= binom.ppf(1e-4, repeats, error_rate)).all()


@pytest.mark.parametrize(
    ("present", "absent", "rate", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), 0.01, "shape"),
        (np.zeros((1, 2)), np.zeros((1, 2)), 0.01, "n >= 2"),
        (np.full((3, 1), np.nan), np.zeros((3, 1)), 0.01, "not finite"),
        (np.zeros((3, 1)), np.zeros((3, 1)), 0.5, "below one half"),
    ],
)
def test_samples_without_a_distance_are_refused(present: np.ndarray, absent: np.ndarray, rate: float, message: str):
    with pytest.raises(ArgumentRefused, match=message):
        separation(present, absent, rate)


# One training run


def worst_case(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The theorem's supremum by linear programming over all ways to give coins away; sums in plain arithmetic."""
    share = math.exp(epsilon) / (1 + math.exp(epsilon))

    def tail(v: int) -> float:
        counts = range(max(v, 0), guesses + 1)
        return math.fsum(math.comb(guesses, k) * share**k * (1 - share) ** (guesses - k) for k in counts)

    numbers = range(1, canaries + 1)
    gains = [tail(right - j) - tail(right) for j in numbers]
    best = linprog([-g for g in gains], A_ub=[list(numbers)], b_ub=[2 * canaries * delta], bounds=(0, None))
    return min(1.0, tail(right) - best.fun)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("canaries", "guesses"), [(1, 1), (6, 6), (20, 12), (40, 40)])
def test_the_p_value_is_the_worst_case_of_the_theorem(canaries: int, guesses: int, epsilon: float, delta: float):
    for right in range(guesses + 1):
        expected = worst_case(canaries, guesses, right, epsilon, delta)
        assert p_value(canaries, guesses, right, epsilon, delta) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def leaky_response(size: int, epsilon: float, known: float) -> dict[int, float]:
    """Number right -> probability, by enumeration: each coin is shown with probability `known`, else answered for."""
    share = known + (1 - known) * math.exp(epsilon) / (1 + math.exp(epsilon))
    found = dict.fromkeys(range(size + 1), 0.0)
    for answers in product((True, False), repeat=size):
        found[sum(answers)] += math.prod(share if answer else 1 - share for answer in answers)
    return found


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [0.0, 0.01])
def test_mechanisms_that_use_all_of_their_budget_stay_below_the_p_value(epsilon: float, delta: float) -> None:
    size = 9
    each = leaky_response(size, epsilon, delta)  # (epsilon, delta): one coin decides one answer
    together = {v: (1 - delta) * p for v, p in leaky_response(size, epsilon, 0.0).items()}
    together[size] += delta  # all coins are shown at once, seldom
    for found in (each, together):
        for right in range(size + 1):
            at_least = sum(p for v, p in found.items() if v >= right)
            assert at_least <= p_value(size, size, right, epsilon, delta) * (1 + 1e-9)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(("delta", "known"), [(0.0, 0.0), (1e-4, 1e-4)])
def test_the_bound_holds_its_confidence_on_randomised_response(epsilon, delta, known, confidence) -> None:
    size = 120
    share = known + (1 - known) * math.exp(epsilon) / (1 + math.exp(epsilon))
    too_high = [v for v in range(size + 1) if epsilon_lower_bound(size, size, v, delta, confidence) > epsilon + 1e-9]
    failing = sum(binom.pmf(v, size, share) for v in too_high)  # exact: no simulation
    assert failing <= 1 - confidence
    if delta == 0.0:  # and it is no looser than counting forces it to be
        assert failing + binom.pmf(min(too_high, default=size) - 1, size, share) > 1 - confidence


def test_choosing_the_number_of_guesses_keeps_the_confidence() -> None:
    generator, repeats, epsilon = np.random.default_rng(0), 100, 1.0
    above = 0
    for _ in range(repeats):
        present = generator.random(128) < 0.5
        told = np.where(generator.random(128) < 1 / (1 + math.exp(-epsilon)), present, ~present)
        scores = told + generator.random(128) / 2  # ties are broken at random
        above += best_guesses(scores, present, 0.0, 0.9)[0] > epsilon
    assert above <= binom.isf(1e-4, repeats, 0.1)


def test_the_bound_rises_with_right_guesses_and_falls_with_confidence_and_delta() -> None:
    bounds = [epsilon_lower_bound(200, 100, right, 1e-5, 0.95) for right in range(0, 101, 5)]
    assert bounds == sorted(bounds) and bounds[10] == 0.0 and 3.0 < bounds[-1] < 4.0
    strict = [epsilon_lower_bound(200, 100, 90, 1e-5, confidence) for confidence in (0.8, 0.95, 0.999)]
    assert strict == sorted(strict, reverse=True)
    leaky = [epsilon_lower_bound(200, 100, 90, delta, 0.95) for delta in (0.0, 1e-5, 1e-3, 0.1)]
    assert leaky == sorted(leaky, reverse=True) and leaky[-1] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"right": 11}, "right <= guesses"), ({"guesses": 21}, "guesses <= canaries"), ({"epsilon": -1.0}, "epsilon"),
     ({"delta": 2.0}, "delta"), ({"right": -1}, "0 <= right")],
)  # fmt: skip
def test_impossible_counts_and_numbers_are_refused(change: dict, message: str) -> None:
    usual = {"canaries": 20, "guesses": 10, "right": 5, "epsilon": 1.0, "delta": 1e-5}
    with pytest.raises(ArgumentRefused, match=message):
        p_value(**(usual | change))
    with pytest.raises(ArgumentRefused, match="confidence"):
        epsilon_lower_bound(20, 10, 5, 1e-5, 1.0)


# Canaries in a trainer


def memorising(folder: Path, **changes: object) -> DPTrainer:
    """A linear model on pictures of random classes, which it can only learn by heart."""
    settings = {
        "train_dataset": Images(300), "seed": None, "logical_batch_size": 150, "per_device_train_batch_size": 150,
        "max_steps": 20, "learning_rate": 1.0, "logging_strategy": "no", "noise_multiplier": 3.0,
        "target_delta": 1e-5,
    }  # fmt: skip
    return trainer(folder, Linear(), **(settings | changes))


def test_a_correct_run_is_not_contradicted(tmp_path: Path) -> None:
    found = audit_run(memorising(tmp_path), canaries=100, coins=np.random.default_rng(0))
    assert 0.0 <= found.lower <= found.claimed and not found.violated
    assert found.canaries == 100 and len(found.scores) == 100 and 20 < found.included < 80


class NoNoise(NoiseSource):
    """A source that says it is the system's and adds nothing."""

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        return torch.zeros(tuple(shape))


class NoNoiseRandomness:
    """Randomness that claims to be secret, with no noise in it."""

    secret = True

    def sampling_key(self, train_call: int) -> bytes:
        return FixedRandomness(0).sampling_key(train_call)

    def noise_source(self, device: torch.device) -> Callable[[int], NoiseSource]:
        source = NoNoise.from_os_entropy(device)
        return lambda step: source


def test_a_run_whose_noise_is_missing_is_a_violation(tmp_path: Path) -> None:
    run = memorising(tmp_path, randomness=NoNoiseRandomness(), noise_multiplier=20.0, max_steps=60)
    found = audit_run(run, canaries=150, coins=np.random.default_rng(0))
    assert found.claimed < 0.5 < 1 < found.lower and found.violated


def test_zeroed_out_canaries_contribute_nothing_and_do_not_change_the_size() -> None:
    audited_set = with_canaries(Images(40), 20, "labels")
    assert len(audited_set) == 60
    for number, there in enumerate(audited_set.present):
        if there:
            assert audited_set[40 + number] is audited_set.canaries[number]
        else:
            with pytest.raises(DataRefused):
                audited_set[40 + number]


def test_a_canary_is_a_picture_with_the_label_of_another() -> None:
    images = Images(40)
    true = {tuple(images[i]["pixel_values"].flatten()[:3].tolist()): images[i]["labels"] for i in range(40)}
    for canary in with_canaries(images, 20, "labels").canaries:
        assert true[tuple(canary["pixel_values"].flatten()[:3].tolist())] != canary["labels"]


@pytest.mark.parametrize("count", [3, 21])
def test_a_useless_number_of_canaries_is_refused(count: int) -> None:
    with pytest.raises(ArgumentRefused, match=f"{count} canaries for 40 examples"):
        with_canaries(Images(40), count, "labels")


def test_examples_that_cannot_be_mislabelled_are_refused() -> None:
    alike = Images(40)
    alike.labels[:] = 1
    with pytest.raises(DataRefused, match="labels of these do not differ"):
        with_canaries(alike, 10, "labels")
    with pytest.raises(DataRefused, match="no mapping with the key 'target'"):
        with_canaries(Images(40), 10, "target")


def test_runs_that_claim_nothing_or_have_begun_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentRefused, match="no claim to audit"):
        audit_run(memorising(tmp_path / "a", disable_dp=True), 100)
    trained = memorising(tmp_path / "b", max_steps=1)
    trained.train()
    with pytest.raises(ArgumentRefused, match="trained already"):
        audit_run(trained, 100)


def test_a_finding_is_plain_json_without_the_coins() -> None:
    nothing = np.zeros(4)
    found = Finding(math.inf, 1e-5, 0.0, 0.95, 4, 2, 4, 2, ((4, 2, 0.0),), nothing, nothing > 1)
    assert found.to_dict() == {
        "claimed": "inf", "delta": 1e-5, "lower": 0.0, "confidence": 0.95, "canaries": 4, "included": 2,
        "guesses": 4, "right": 2, "tries": [[4, 2, 0.0]], "violated": False,
    }  # fmt: skip


# The command

FACTORY = """
from pathlib import Path

import torch
from hf_dpvision import DPTrainer, DPTrainingArguments


def make(folder, arguments):
    print("words of the recipe")
    generator = torch.Generator().manual_seed(0)
    examples = [
        {"pixel_values": torch.randn(12, generator=generator), "labels": number % 3} for number in range(80)
    ]
    args = DPTrainingArguments(
        folder, noise_multiplier=float(arguments[0]), target_delta=1e-4, logical_batch_size=40, max_steps=3,
        use_cpu=True, disable_tqdm=True, self_check=False, accountant="rdp", save_strategy="no", run_report=False,
    )
    return DPTrainer(Named(), args, train_dataset=examples)


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(12, 3)

    def forward(self, pixel_values):
        return self.head(pixel_values)


def broken(folder, arguments):
    return folder
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "my_recipe.py"
    path.write_text(FACTORY)
    return str(path)


def test_the_command_prints_claim_bound_and_why_it_is_weak(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", "--canaries", "20", "--confidence", "0.999", f"{factory}:make", "--", "2.0"]) == 0
    told = capsys.readouterr()
    for part in ("claimed      epsilon <= ", "with confidence 99.9%", "No violation detected.", "weak", "not covered"):
        assert part in told.out
    assert "words of the recipe" in told.err and "words of the recipe" not in told.out


def test_the_command_as_json_has_the_counts(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", "--canaries", "20", "--json", f"{factory}:make", "--", "2.0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["canaries"] == 20 and report["violated"] is False and 0 < report["claimed"] < 20
    assert not {"scores", "present"} & set(report)


def test_a_violation_ends_the_command_with_code_1(
    factory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "best_guesses", lambda *given: (99.0, 20, 20, [(20, 20, 99.0)]))
    assert cli.main(["audit", "--canaries", "20", f"{factory}:make", "--", "2.0"]) == 1
    told = capsys.readouterr().out
    assert "VIOLATION" in told and "No violation" not in told


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("{}", [], "names no function"),
        ("{}:absent", [], "has no function 'absent'"),
        ("{}:broken", [], "returned a str and not a DPTrainer"),
        ("{}.py:make", [], "There is no file"),
        ("no_such_package:make", [], "cannot be imported"),
        ("{}:make", ["--confidence", "1"], "no probability"),
        ("{}:make", ["--canaries", "50"], "50 canaries for 80 examples"),
    ],
)
def test_a_wrong_factory_or_option_ends_with_code_2(
    factory: str, name: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", *options, name.format(factory), "--", "2.0"]) == 2
    assert message in capsys.readouterr().err


def test_the_picture_is_a_png_or_its_absence_is_refused_before_training(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(tmp_path / "audit.png")
    command = ["audit", "--canaries", "20", "--confidence", "0.999", "--plot", picture, f"{factory}:make", "--", "2.0"]
    with monkeypatch.context() as patch:
        patch.setattr(plots.importlib.util, "find_spec", lambda name: None)
        assert cli.main(command) == 2
    assert "hf_dpvision[audit]" in capsys.readouterr().err and not (tmp_path / "audit.png").exists()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `audit`)")
    assert cli.main(command) == 0
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
