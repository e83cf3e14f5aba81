"""A plan stays within its budgets, is what its rules say, and looks at nothing private."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from hf_dpvision import accounting, cli, planning
from hf_dpvision.accounting import Event, Ledger, TruncatedNegativeBinomial, selection
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.planning import Budget, propose
from hf_dpvision.scaling_rules import Reference, distance_at, gradient_noise_scale


CIFAR = Budget(epsilon=3.0, delta=1e-6, dataset_size=50_000, hours=2.0, images_per_second=200.0, accountant="rdp")
FLAGS = ["--target-epsilon", "3", "--dataset-size", "50000", "--hours", "2", "--accountant", "rdp"]
SPEED = ["--images-per-second", "200"]


@pytest.fixture(scope="module")
def found():
    return propose(CIFAR, [Reference(0.5, 200, 2.0)])


def test_every_plan_stays_within_both_budgets(found):
    for plan in (*found.proposals, *found.in_less_time):
        rate = plan.logical_batch_size / CIFAR.dataset_size
        ledger = Ledger([Event(rate, plan.noise_multiplier, plan.steps)])
        assert plan.epsilon == ledger.epsilon(CIFAR.delta, "rdp").upper <= CIFAR.epsilon
        assert plan.hours == plan.steps * plan.logical_batch_size / 200 / 3600 <= CIFAR.hours
        assert plan.epochs == pytest.approx(plan.steps * rate)
        assert plan.update_noise == plan.noise_multiplier / plan.logical_batch_size
    assert [plan.hours <= share * CIFAR.hours for plan, share in zip(found.in_less_time, (0.5, 0.25), strict=True)]


def test_the_signal_is_relative_to_one_release_of_the_whole_data_sets_gradient(found):
    single = accounting.noise_multiplier(target_epsilon=3.0, delta=1e-6, sample_rate=1.0, steps=1)
    for plan in found.proposals:
        ours = math.sqrt(plan.steps) * plan.logical_batch_size / plan.noise_multiplier
        assert plan.signal == pytest.approx(ours / (50_000 / single))
        assert 0 < plan.signal < 1.001


def test_a_larger_batch_in_the_same_time_has_more_signal_and_fewer_steps(found):
    signals, steps = ([getattr(plan, name) for plan in found.proposals] for name in ("signal", "steps"))
    assert signals == sorted(signals) and steps == sorted(steps, reverse=True)


def test_at_much_noise_epsilon_depends_on_the_total_alone():
    """Sander et al. 2023: where sigma is large, plans of equal sqrt(T) B / sigma cost the same."""
    costs = [
        accounting.epsilon(sample_rate=q, noise_multiplier=q * math.sqrt(steps) * 30, steps=steps, delta=1e-6).upper
        for q, steps in ((0.02, 4000), (0.04, 4000), (0.08, 1000), (0.16, 500))
    ]
    assert max(costs) / min(costs) < 1.15
    small = accounting.epsilon(sample_rate=0.02, noise_multiplier=0.02 * math.sqrt(400) * 1.5, steps=400, delta=1e-6)
    large = accounting.epsilon(sample_rate=0.32, noise_multiplier=0.32 * math.sqrt(400) * 1.5, steps=400, delta=1e-6)
    assert small.upper > 1.2 * large.upper  # sigma 0.6 is overcharged, sigma 9.6 is not


def test_the_recommended_plan_loses_little_signal_and_no_smaller_batch_does_as_well():
    sketches = planning._sketches(CIFAR)
    chosen, _ = planning._recommended(sketches, None)
    most = max(one.signal for one in sketches[:-1])
    assert sketches[chosen].signal >= 0.9 * most > sketches[chosen - 1].signal
    within, why = planning._recommended(sketches, 9000.0)
    assert sketches[within].batch == 8192 and "gradient noise scale" in why
    assert planning._recommended(sketches, 10.0)[0] == chosen


def test_steps_beyond_enough_count_for_nothing():
    sketches = planning._sketches(Budget(8.0, 1e-5, 1437, 1.0, 300.0, "rdp"))
    chosen, why = planning._recommended(sketches, None)
    assert sketches[chosen].steps >= 1000 > sketches[chosen + 1].steps and "1000 steps" in why


def test_the_learning_rate_keeps_its_product_with_the_steps(found):
    for plan in found.proposals:
        assert plan.learning_rate * plan.steps == pytest.approx(0.5 * 200 * 3.0 / 2.0)
    assert all(plan.learning_rate is None for plan in propose(CIFAR).proposals)


def test_the_scaling_rule_is_a_line_in_epsilon():
    assert distance_at(3.0, []) is None
    assert distance_at(3.0, [Reference(0.1, 50)]) == pytest.approx(5.0)
    assert distance_at(3.0, [Reference(0.1, 50, 1.0)]) == pytest.approx(15.0)
    assert distance_at(3.0, [Reference(0.1, 50, 1.0), Reference(0.1, 70, 2.0)]) == pytest.approx(9.0)
    for bad in ([Reference(0.1, 50), Reference(0.1, 70, 2.0)], [Reference(0.1, 50, 1.0)] * 2,
                [Reference(0.1, 50, 1.0), Reference(0.1, 10, 1.5)]):  # fmt: skip
        with pytest.raises(ArgumentRefused):
            distance_at(3.0, bad)
    for bad in ((0.0, 5), (0.1, 0), (math.inf, 5), (0.1, 5, 0.0)):
        with pytest.raises(ArgumentRefused):
            Reference(*bad)


def test_a_search_is_priced_by_the_accountant_and_by_random_stopping(found):
    best = found.best
    rate = best.logical_batch_size / CIFAR.dataset_size
    for price in found.searches:
        assert price.composed == pytest.approx(
            Ledger([Event(rate, best.noise_multiplier, price.runs * best.steps)]).epsilon(1e-6, "rdp").upper
        )
        stopping = TruncatedNegativeBinomial(price.runs)
        one = (Event(rate, best.noise_multiplier, best.steps),)
        assert price.stopped == selection.epsilon(one, 1e-6, stopping).upper > best.epsilon
        within = Ledger([Event(rate, price.composed_noise, price.runs * best.steps)])
        assert within.epsilon(1e-6, "rdp").upper <= 3.0
        assert selection.epsilon((Event(rate, price.stopped_noise, best.steps),), 1e-6, stopping).upper <= 3.0


def test_the_cheap_run_has_the_noise_of_the_recommended_one_in_every_update(found):
    best, proxy = found.best, found.proxy
    assert proxy.noise_multiplier / proxy.logical_batch_size == pytest.approx(best.update_noise)
    assert proxy.logical_batch_size * proxy.cheaper == best.logical_batch_size


@pytest.mark.parametrize("noisy", [False, True])
def test_the_gradient_noise_scale_is_that_of_its_definition(noisy):
    generator = torch.Generator().manual_seed(0)
    mean, spread, std = torch.full((50,), 0.3, dtype=torch.float64), 2.0, 0.4
    expected = 50 * spread**2 / float(mean.square().sum())

    def squared_norm(batch: int) -> float:
        noise = torch.randn(40_000, 50, generator=generator, dtype=torch.float64) * spread / math.sqrt(batch)
        added = torch.randn(40_000, 50, generator=generator, dtype=torch.float64) * std * noisy
        return float((mean + noise + added).square().sum(1).mean())

    power = 50 * std**2 * noisy
    found = gradient_noise_scale((squared_norm(8), squared_norm(64)), (8, 64), (power, power))
    assert found == pytest.approx(expected, rel=0.05)
    assert gradient_noise_scale((1.0, 0.1), (8, 80)) == math.inf
    with pytest.raises(ArgumentRefused):
        gradient_noise_scale((1.0, 1.0), (8, 8))


@pytest.mark.parametrize(("size", "delta"), [(1437, 1e-5), (10_000, 1e-5), (50_000, 1e-6), (1_281_167, 1e-8)])
def test_the_default_delta_is_a_power_of_ten_well_below_one_over_the_size(size, delta):
    assert planning.default_delta(size) == pytest.approx(delta)


@pytest.mark.parametrize(
    "budget",
    [Budget(8.0, 1e-3, 100, 0.001, 1.0, "rdp"), Budget(8.0, 1e-3, 100, 100.0, 1000.0, "rdp"),
     Budget(8.0, 1e-2, 2, 1.0, 1.0, "rdp")],
)  # fmt: skip
def test_budgets_at_the_edge_have_a_plan(budget):
    found = propose(budget)
    assert all(plan.epsilon <= 8.0 and plan.hours <= budget.hours and plan.steps >= 1 for plan in found.proposals)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--images-per-second", "0"], "no positive"),
        ([*SPEED, "--delta", "1e-3"], "not below 1 / 50000"),
        ([*SPEED, "--hours", "0"], "no positive"),
        (["--images-per-second", "1e-9"], "not one image"),
        ([*SPEED, "--dataset-size", "1"], "nobody to hide"),
        ([*SPEED, "--reference", "0.1"], "LEARNING_RATE:STEPS"),
        ([*SPEED, "--reference", "0.1:ten"], "LEARNING_RATE:STEPS"),
        ([*SPEED, "--reference", "0.1:0"], "at least one step"),
        ([*SPEED, "--target-epsilon", "-1"], "target_epsilon"),
        ([*SPEED, "--accountant", "gdp"], "central-limit"),
        (["--model", "timm/resnet10t"], "--measure"),
        (["--model", "timm/resnet10t", "--measure", "--image-size", "0"], "one pixel"),
    ],
)
def test_wrong_values_end_with_code_2_and_one_line(capsys, more, words):
    assert cli.main(["plan", *FLAGS, *more]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_the_command_says_the_same_as_the_library(capsys, found):
    assert cli.main(["plan", *FLAGS, *SPEED, "--reference", "0.5:200:2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["budget"]["delta"] == 1e-6
    best = report["proposals"][report["recommended"]]
    for name in ("noise_multiplier", "learning_rate", "epsilon"):
        assert best[name] == getattr(found.best, name)
    assert cli.main(["plan", *FLAGS, *SPEED]) == 0
    out = capsys.readouterr().out
    for part in (f"batch {found.best.logical_batch_size}, ", "No learning rate without", "search", "public data"):
        assert part in out, part


def test_the_speed_is_measured_on_random_images_of_a_model(capsys):
    assert cli.main(["plan", *FLAGS, "--model", "timm/resnet10t", "--measure", "--image-size", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"]["images_per_second"] > 0
    assert cli.main(["plan", *FLAGS, "--model", "timm/no_such_model", "--measure"]) == 1


def test_planning_loads_no_model_library():
    script = (
        "import sys; from hf_dpvision import cli; cli.main(['plan', *sys.argv[1:]]);"
        "print([name for name in ('torch', 'transformers', 'timm', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, *FLAGS, *SPEED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
