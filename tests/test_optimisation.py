"""What is made of noisy gradients and of iterates is what the papers define, costs nothing, and survives a crash.

Long, because three methods are each held to their definition, and then to crashes and processes.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from scipy import signal
from torch import Tensor, nn
from trainer_cases import Images, Linear, tiny_vit, trainer, weights
from transformers import TrainerCallback

from hf_dpvision import clipping
from hf_dpvision.accounting.journal import FILE, FOLDER
from hf_dpvision.clipping_arguments import STYLES
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.optimisation import AdamBC, LowPass
from hf_dpvision.release import released_files


STEPS = 40


def seeded_linear() -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Linear()


def adapted_vit() -> nn.Module:
    """With a LoRA adapter and a head to be trained."""
    peft = pytest.importorskip("peft")
    model = tiny_vit()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


def gradients(steps: int = STEPS, size: int = 50) -> Tensor:
    """A slow signal under noise, float64 `[steps, size]`."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(steps, size, dtype=torch.float64, generator=generator)
    return drawn + torch.linspace(-3, 3, size, dtype=torch.float64) * torch.linspace(1, 0.2, steps)[:, None]


def stepped(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, given: Tensor) -> Tensor:
    """Step once per row of `given`; return what the parameter is behind each step."""
    found = []
    for row in given:
        parameter.grad = row.to(parameter.dtype).view_as(parameter)
        optimizer.step()
        found.append(parameter.detach().clone().reshape(-1))
    return torch.stack(found).double()


# DP-AdamBC


def adam_bc_by_hand(given: Tensor, start: Tensor, lr, noise_std, beta1, beta2, floor, decay) -> Tensor:
    """Algorithm 1 of arXiv:2312.14334 with decoupled weight decay, from the definition of the moments as sums."""
    found, weight = [], start.clone()
    for t in range(1, len(given) + 1):
        ages = torch.arange(t - 1, -1, -1, dtype=torch.float64)[:, None]
        mean = ((1 - beta1) * beta1**ages * given[:t]).sum(0) / (1 - beta1**t)
        square = ((1 - beta2) * beta2**ages * given[:t] ** 2).sum(0) / (1 - beta2**t)
        signal_part = torch.maximum(square - noise_std**2, torch.tensor(floor * noise_std**2, dtype=torch.float64))
        weight = weight - lr * decay * weight - lr * mean / signal_part.sqrt()
        found.append(weight)
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adam_bc_equals_its_definition(dtype):
    settings = {"lr": 0.02, "noise_std": 1.0, "floor": 0.3}
    start = torch.linspace(-1, 1, 50, dtype=torch.float64)
    parameter = nn.Parameter(start.to(dtype).view(5, 10).clone())
    optimizer = AdamBC([parameter], betas=(0.8, 0.97), weight_decay=0.1, **settings)
    expected = adam_bc_by_hand(gradients(), start, **settings, beta1=0.8, beta2=0.97, decay=0.1)
    found = stepped(optimizer, parameter, gradients())
    assert (found - expected).abs().max() < (1e-13 if dtype == torch.float64 else 2e-5)


def test_adam_bc_without_noise_to_speak_of_is_adamw_and_under_much_noise_sgd_with_momentum():
    given, lr = gradients(), 0.01
    pairs = []
    for make in (
        lambda p: AdamBC([p], lr, noise_std=1e-9, floor=1.0, weight_decay=0.1),
        lambda p: torch.optim.AdamW([p], lr, eps=0.0, weight_decay=0.1),
    ):
        parameter = nn.Parameter(torch.ones(50, dtype=torch.float64))
        pairs.append(stepped(make(parameter), parameter, given))
    assert torch.allclose(*pairs, atol=1e-12)
    parameter = nn.Parameter(torch.ones(50, dtype=torch.float64))
    found = stepped(AdamBC([parameter], lr, noise_std=100.0, floor=0.25), parameter, given)
    means = torch.stack(
        [sum(0.1 * 0.9 ** (t - k) * given[k] for k in range(t + 1)) / (1 - 0.9 ** (t + 1)) for t in range(STEPS)]
    )
    assert torch.allclose(found, 1 - lr / 50.0 * means.cumsum(0), atol=1e-12)


CORRECTED = {"noise_bias_correction": True, "optim": "adamw_torch", "learning_rate": 0.01}


@pytest.mark.parametrize("style", STYLES)
def test_the_variance_that_is_subtracted_is_that_of_the_noise_in_the_gradient(tmp_path, style):
    # Only noise is released: the pixels are NaN. The mean of 120 squares of 2307 normals; false-positive rate 1e-6.
    data = Images()
    data.pixels[:] = float("nan")
    run = trainer(
        tmp_path, Linear(), train_dataset=data, clipping=style, per_sample_max_grad_norm=0.3, noise_multiplier=1.7,
        max_steps=120, adam_beta2=0.9999, **CORRECTED,
    )  # fmt: skip
    run.train()
    optimizer = run.optimizer.optimizer
    assert isinstance(optimizer, AdamBC) and run.lr_scheduler.get_last_lr() == [0.01, 0.01]
    squares = torch.cat([state["exp_avg_sq"].reshape(-1) for state in optimizer.state.values()]).double()
    count = 120 * squares.numel()
    ratio = float(squares.mean()) / (1 - 0.9999**120) / optimizer.noise_std**2
    assert abs(ratio - 1) < 4.9 * math.sqrt(2 / count) * 1.01  # weights differ by 1.2 %
    assert optimizer.noise_std == pytest.approx(1.7 * run.args.build_clipping().sensitivity() / 8)


def test_the_noise_that_is_corrected_for_is_the_calibrated_one(tmp_path):
    run = trainer(tmp_path, Linear(), noise_multiplier=None, target_epsilon=4.0, **CORRECTED)
    run.train()
    sigma = run.privacy_statement()["noise"]["multiplier"]
    assert run.optimizer.optimizer.noise_std == sigma * clipping.Flat(1.0).sensitivity() / 8
    run = trainer(tmp_path / "two", Linear(), **CORRECTED | {"max_steps": 2})
    run.train()
    moments = run.optimizer.optimizer.state
    run.args.noise_multiplier = 3.0
    run.train()
    assert run.optimizer.optimizer.noise_std == 3.0 / 8
    assert run.optimizer.optimizer.state is moments and all(state["step"] == 4 for state in moments.values())


def test_an_optimizer_that_is_there_already_is_refused(tmp_path):
    model = Linear()
    own = (torch.optim.Adam(model.parameters()), None)
    with pytest.raises(ArgumentRefused, match="Adam: it would go on as it is"):
        trainer(tmp_path, model, optimizers=own, **CORRECTED)
    run = trainer(tmp_path, Linear(), **CORRECTED)
    with pytest.raises(ArgumentRefused, match="before train"):
        run.create_optimizer()
    run.train()
    run.args.noise_bias_correction = False
    with pytest.raises(ArgumentRefused, match="noise_bias_correction=False.*AdamBC"):
        run.train()
    assert run._run.ledger.steps == 4


# DOPPLER


def doppler_by_hand(given: Tensor, b: list[float], a: list[float]) -> Tensor:
    """m_t / c_t of arXiv:2408.13460, Algorithm 1, from their recursions; `a` without a_0 = 1."""
    m, c = [], []
    for t in range(len(given)):
        inputs = [(k, t - k) for k in range(len(b)) if t >= k]
        earlier = [(k, t - k) for k in range(1, len(a) + 1) if t >= k]
        m.append(sum(b[k] * given[i] for k, i in inputs) - sum(a[k - 1] * m[i] for k, i in earlier))
        c.append(sum(b[k] for k, _ in inputs) - sum(a[k - 1] * c[i] for k, i in earlier))
    return torch.stack([mean / gain for mean, gain in zip(m, c, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("order", "cutoff"), [(1, 0.1), (2, 0.1), (2, 0.01)])
def test_the_low_pass_filter_equals_its_definition(order, cutoff, dtype):
    b, a = signal.butter(order, cutoff, fs=1.0)
    given = gradients()
    expected = -doppler_by_hand(given, list(b), list(a[1:])).cumsum(0)
    parameter = nn.Parameter(torch.zeros(5, 10, dtype=dtype))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with LowPass.butterworth(order, cutoff).before(optimizer):
        found = stepped(optimizer, parameter, given)
    bound = 1e-14 if dtype == torch.float64 else 3e-6
    assert (found - expected).abs().max() < bound * expected.abs().max()
    before = parameter.detach().clone()
    stepped(optimizer, parameter, given[:1])  # outside, the optimizer gets what it is given
    assert torch.equal(parameter, before - given[0].to(dtype).view(5, 10))


@pytest.mark.parametrize("order", [1, 2])
def test_a_constant_gradient_goes_through_unchanged_and_noise_is_weakened(order):
    low_pass = LowPass.butterworth(order, 0.05)
    constant = doppler_by_hand(torch.ones(30, 1, dtype=torch.float64), low_pass.b, low_pass.a)
    assert (constant - 1).abs().max() < 1e-12
    noise = torch.randn(1000, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = float(doppler_by_hand(noise, low_pass.b, low_pass.a)[100:].square().mean())
    impulse = [1.0] + 499 * [0.0]
    expected = (signal.lfilter(low_pass.b, [1.0, *low_pass.a], impulse) ** 2).sum()
    assert left == pytest.approx(expected, rel=0.02) and left < 0.2


def test_the_first_order_filter_is_the_one_of_the_paper_and_both_halve_the_power_at_the_cutoff():
    first = LowPass.butterworth(1, math.atan(0.1) / math.pi)
    assert first.b == pytest.approx((1 / 11, 1 / 11)) and first.a == pytest.approx((-9 / 11,))
    for order in (1, 2):
        low_pass = LowPass.butterworth(order, 0.07)
        z = complex(math.cos(2 * math.pi * 0.07), -math.sin(2 * math.pi * 0.07))
        answer = sum(b * z**k for k, b in enumerate(low_pass.b)) / sum(
            a * z**k for k, a in enumerate((1.0, *low_pass.a))
        )
        assert abs(answer) ** 2 == pytest.approx(0.5)
        assert sum(low_pass.b) == pytest.approx(1 + sum(low_pass.a))  # a constant keeps its size


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adafactor"])
def test_the_optimizer_gets_filtered_gradients_and_keeps_its_own_state(tmp_path, optim):
    noisy, used = [], []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            noisy.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double())

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            used.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double())

    run = trainer(tmp_path, Linear(), callbacks=[Look()], optim=optim, low_pass_filter=2, max_steps=12)
    run.train()
    run.train()  # goes on, also with the memory of the filter
    low_pass = run.args.build_low_pass()
    expected = doppler_by_hand(torch.stack(noisy), low_pass.b, low_pass.a)
    assert len(used) == 24 and (torch.stack(used) - expected).abs().max() < 1e-5
    state = run.optimizer.optimizer.state[run.model.head.weight]
    assert ("exp_avg" in state) == (optim == "adamw_torch") and "low_pass_1" in state
    assert not run.optimizer.optimizer._optimizer_step_pre_hooks


# Averages of the weights


class Iterates(TrainerCallback):
    """Keeps the weights behind every step, and those before the first."""

    def __init__(self) -> None:
        self.of_step: list[Tensor] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.of_step.append(weights(model).double())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.of_step.append(weights(model).double())


def averaged_by_hand(iterates: list[Tensor], changes: dict) -> Tensor:
    """The average of the iterates behind steps 0, 1, ..., from its definition, float64."""
    if "ema_decay" in changes:
        average = iterates[0]
        for t, iterate in enumerate(iterates[1:]):
            decay = min(changes["ema_decay"], (1 + t) / (10 + t))
            average = decay * average + (1 - decay) * iterate
        return average
    last = len(iterates) - 1
    steps = changes["tail_averaging"] if changes["tail_averaging"] >= 1 else round(changes["tail_averaging"] * last)
    return torch.stack(iterates[last - steps + 1 :]).mean(0)


AVERAGES = [{"ema_decay": 0.5}, {"tail_averaging": 0.5}, {"tail_averaging": 4}]
AVERAGED = pytest.mark.parametrize("changes", AVERAGES, ids=str)


@AVERAGED
@pytest.mark.parametrize("plain", [False, True], ids=["private", "without privacy"])
def test_the_released_weights_are_the_average_of_the_iterates(tmp_path, changes, plain):
    iterates, settings = Iterates(), {"max_steps": 12, "disable_dp": plain}
    run = trainer(tmp_path / "a", tiny_vit(), callbacks=[iterates], **settings | changes)
    output = run.train()
    expected = averaged_by_hand(iterates.of_step, changes)
    assert len(iterates.of_step) == 13 and (weights(run.model) - expected).abs().max() < 1e-6
    assert (iterates.of_step[-1] - expected).abs().max() > 1e-4
    last = trainer(tmp_path / "b", tiny_vit(), **settings)
    last.train()
    assert torch.equal(weights(last.model).double(), iterates.of_step[-1])  # training is what it was
    assert last.epsilon() == run.epsilon()
    told = {name: value for name, value in output.metrics.items() if "iterate" in name or "averaged" in name}
    if "ema_decay" in changes:
        assert not told
    else:
        tail = torch.stack(iterates.of_step[-told["averaged_steps"] :])
        variance = tail.var(0)
        assert told["averaged_steps"] == (6 if changes["tail_averaging"] < 1 else 4)
        assert told["iterate_std"] == pytest.approx(float(variance.mean().sqrt()), rel=1e-4)
        relative = float(variance.sum().sqrt() / tail.mean(0).norm())
        assert told["relative_iterate_std"] == pytest.approx(relative, rel=1e-4)


@pytest.mark.parametrize(("changes", "first"), [({"ema_decay": 0.5}, 1), ({"tail_averaging": 4}, 6)], ids=str)
def test_what_is_evaluated_saved_and_uploaded_is_the_average_also_in_between(tmp_path, changes, first):
    iterates, evaluated = Iterates(), []
    run = trainer(
        tmp_path, Linear(), callbacks=[iterates], eval_dataset=Images(8), eval_data="public", eval_strategy="steps",
        eval_steps=3, save_strategy="steps", save_steps=3, save_total_limit=None, max_steps=9, learning_rate=1.0,
        load_best_model_at_end=True, **changes,
    )  # fmt: skip
    honest = run.compute_loss

    def compute_loss(model, *args, **kwargs):
        evaluated.append(weights(model).double())
        return honest(model, *args, **kwargs)

    run.compute_loss = compute_loss
    run.train()
    for step in (3, 6, 9):
        if "ema_decay" in changes:
            expected = averaged_by_hand(iterates.of_step[: step + 1], changes)
        else:
            expected = torch.stack(iterates.of_step[min(first, step) : step + 1]).mean(0)
        folder = tmp_path / f"checkpoint-{step}"
        saved = safetensors.torch.load_file(folder / "model.safetensors")
        shown = torch.cat([saved[name].reshape(-1) for name in ("head.weight", "head.bias")])
        assert (shown - expected).abs().max() < 1e-6
        assert any(torch.equal(shown.double(), one) for one in evaluated)
        assert (folder / "iterate.safetensors").exists() == (step >= first)
        assert "iterate.safetensors" not in released_files(folder)
        if step >= first:
            kept = safetensors.torch.load_file(folder / "iterate.safetensors")
            kept = torch.cat([kept[name].reshape(-1) for name in ("head.weight", "head.bias")])
            assert torch.equal(kept.double(), iterates.of_step[step])
    best = safetensors.torch.load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert torch.equal(run.model.head.weight, best["head.weight"])
    run.save_model()
    run.create_model_card()
    final = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(final["head.weight"], best["head.weight"])
    assert "released weights" in (tmp_path / "README.md").read_text()
    assert "iterate std" not in (tmp_path / "README.md").read_text()  # that of other weights


def test_the_card_says_how_far_the_averaged_iterates_lie_apart(tmp_path):
    run = trainer(tmp_path, Linear(), seed=None, tail_averaging=3)
    metrics = run.train().metrics
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "mean over the last 3 steps" in card and re.search(r"averaged steps \| 3 ", card)
    assert f"{metrics['iterate_std']:.3g}" in card and f"{metrics['relative_iterate_std']:.3g}" in card
    assert run.state.log_history[-2]["iterate_std"] == metrics["iterate_std"]


def test_a_second_training_starts_from_the_average(tmp_path):
    iterates = Iterates()
    run = trainer(tmp_path, Linear(), callbacks=[iterates], ema_decay=0.5)
    run.train()
    first = weights(run.model).double()
    run.train()
    assert torch.equal(iterates.of_step[5], first)
    assert (weights(run.model) - averaged_by_hand(iterates.of_step[5:], {"ema_decay": 0.5})).abs().max() < 1e-6


class Dies(RuntimeError):
    """Stands for whatever ends a run."""


class DieAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise Dies


def test_a_training_that_fails_leaves_the_average_too(tmp_path):
    iterates = Iterates()
    run = trainer(tmp_path, Linear(), callbacks=[iterates, DieAt(4)], ema_decay=0.9)
    with pytest.raises(Dies):
        run.train()
    assert len(iterates.of_step) == 4
    assert (weights(run.model) - averaged_by_hand(iterates.of_step, {"ema_decay": 0.9})).abs().max() < 1e-6
    assert not run.optimizer.optimizer._optimizer_step_post_hooks


def test_a_tail_that_was_not_reached_is_told(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    iterates = Iterates()
    run = trainer(tmp_path, Linear(), callbacks=[iterates, Stop()], tail_averaging=2)
    output = run.train()
    assert "before the first iterate to be averaged" in caplog.text and "iterate_std" not in output.metrics
    assert torch.equal(weights(run.model).double(), iterates.of_step[-1])


# Resuming


SAVING = {
    "save_strategy": "steps", "save_steps": 3, "save_total_limit": None, "max_steps": 11, "learning_rate": 1e-2,
    "optim": "adamw_torch", "lr_scheduler_type": "linear", "eval_dataset": Images(8), "eval_strategy": "steps",
    "eval_steps": 4,
}  # fmt: skip
# dropout, so that evaluating other weights in between must leave the generators alone
RESUMED = [
    (lambda: tiny_vit(0.1), {"noise_bias_correction": True, "tail_averaging": 0.6}),
    (adapted_vit, {"low_pass_filter": 1, "ema_decay": 0.8}),
    (seeded_linear, {"low_pass_filter": 2, "optim": "sgd", "tail_averaging": 5, "full_determinism": True}),
]


@pytest.mark.parametrize(("build", "changes"), RESUMED, ids=["Adam", "adapter", "tail"])
def test_resuming_equals_not_being_interrupted_bit_for_bit(tmp_path, build, changes):
    through = trainer(tmp_path / "through", build(), **SAVING | changes)
    metrics = through.train().metrics
    lines = (tmp_path / "through" / FOLDER / FILE).read_bytes().splitlines(keepends=True)
    for behind in (3, 9):
        ledger = tmp_path / str(behind) / FOLDER / FILE
        ledger.parent.mkdir(parents=True)
        ledger.write_bytes(b"".join(lines[: 2 + behind]))
        torch.manual_seed(12345)
        again = trainer(tmp_path / str(behind), build(), **SAVING | changes | {"save_strategy": "no"})
        found = again.train(resume_from_checkpoint=str(tmp_path / "through" / f"checkpoint-{behind}")).metrics
        assert torch.equal(weights(through.model), weights(again.model))
        assert {k: v for k, v in found.items() if "std" in k} == {k: v for k, v in metrics.items() if "std" in k}
        history = [[logs for logs in run.state.log_history if "eval_loss" in logs] for run in (through, again)]
        losses = [[logs["eval_loss"] for logs in told] for told in history]
        assert losses[0] == losses[1] and len(losses[0]) == 3


def test_an_average_is_not_taken_for_an_iterate(tmp_path):
    run = trainer(tmp_path, Linear(), **SAVING | {"ema_decay": 0.9, "max_steps": 2})
    run.train()
    for changes, word in (({}, "no average"), ({"tail_averaging": 2}, "the tail one")):
        again = trainer(tmp_path, Linear(), **SAVING | changes)
        with pytest.raises(ArgumentRefused, match=f"exponential average of the iterates, and {word}"):
            again.train(resume_from_checkpoint=True)
        assert again._run.ledger.steps == 2
    again = trainer(tmp_path, Linear(), **SAVING | {"ema_decay": 0.5, "max_steps": 3})
    again.train(resume_from_checkpoint=True)
    assert again._run.ledger.steps == 3


def test_where_the_budget_ends_early_the_tail_ends_there(tmp_path):
    calibrated = {"noise_multiplier": None, "target_epsilon": 4.0, "save_steps": 5, "tail_averaging": 3}
    with pytest.raises(Dies):
        trainer(tmp_path, Linear(), callbacks=[DieAt(8)], **SAVING | calibrated).train()
    iterates = Iterates()
    run = trainer(tmp_path, Linear(), callbacks=[iterates], **SAVING | calibrated)
    metrics = run.train(resume_from_checkpoint=True).metrics
    assert run.state.global_step == 8 and metrics["averaged_steps"] == 3
    assert (weights(run.model) - torch.stack(iterates.of_step[-3:]).mean(0)).abs().max() < 1e-6


# Schedules of the learning rate


def cosine(step: int, steps: int, warmup: int) -> float:
    part = (step - warmup) / (steps - warmup)
    return step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * part))


def test_the_learning_rate_depends_on_the_step_alone_also_when_resumed(tmp_path):
    settings = {"max_steps": 10, "learning_rate": 0.5, "logging_steps": 1, "save_strategy": "steps", "save_steps": 4}
    settings |= {"lr_scheduler_type": "cosine", "warmup_steps": 3}
    expected = [0.5 * cosine(step, 10, 3) for step in range(10)]
    runs = {}
    for name, data, seed, batch in (("a", Images(64), 0, 8), ("b", Images(32), 1, 1)):  # with empty draws
        changes = {"train_dataset": data, "seed": seed, "logical_batch_size": batch}
        runs[name] = trainer(tmp_path / name, Linear(), **settings | changes)
        runs[name].train()
    again = trainer(tmp_path / "a", Linear(), **settings | {"save_strategy": "no"})
    shutil.rmtree(tmp_path / "a" / "checkpoint-10")
    again.train(resume_from_checkpoint=True)
    for run in (*runs.values(), again):
        rates = [logs["learning_rate"] for logs in run.state.log_history if "learning_rate" in logs]
        assert rates == pytest.approx(expected)


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (CORRECTED | {"disable_dp": True}, "disable_dp=True no noise"),
        (CORRECTED | {"optim": "sgd"}, "optim='sgd' adamw_torch"),
        (CORRECTED | {"optim": "adafactor"}, "optim='adafactor' adamw_torch"),
        (CORRECTED | {"low_pass_filter": 1}, "low_pass_filter=1 variance"),
        ({"noise_bias_floor": 0.0}, "noise_bias_floor=0.0 positive"),
        ({"noise_bias_floor": math.inf}, "noise_bias_floor=inf finite"),
        ({"low_pass_filter": 3}, "low_pass_filter=3 1 or 2"),
        ({"low_pass_filter": True}, "low_pass_filter=True 1 or 2"),
        ({"low_pass_cutoff": 0.5}, "low_pass_cutoff=0.5 cycles"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 between"),
        ({"ema_decay": "0.9"}, "ema_decay='0.9' between"),
        ({"ema_decay": math.nan}, "ema_decay=nan between"),
        ({"tail_averaging": 1}, "tail_averaging=1 fraction"),
        ({"tail_averaging": 2.5}, "tail_averaging=2.5 whole"),
        ({"tail_averaging": math.inf}, "tail_averaging=inf whole"),
        ({"tail_averaging": 0.2, "ema_decay": 0.9}, "ema_decay=0.9 tail_averaging=0.2 one"),
        ({"tail_averaging": 0.2, "optim": "schedule_free_sgd"}, "schedule_free_sgd itself"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, changes, words):
    with pytest.raises(ArgumentRefused) as refusal:
        trainer(tmp_path, Linear(), **changes)
    assert all(word in str(refusal.value) for word in words.split())


def test_arguments_changed_before_training_are_looked_at_again(tmp_path):
    run = trainer(tmp_path, Linear())
    run.args.ema_decay = 2.0
    with pytest.raises(ArgumentRefused, match="ema_decay=2.0"):
        run.train()
    assert run._run.ledger.steps == 0
