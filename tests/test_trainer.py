"""One training step is one step of DP-SGD, whatever the microbatches; what is said and saved is true and harmless.

Long, because the trainer puts all parts together, and is looked at from each of them.
"""

from __future__ import annotations

import gc
import inspect
import json
import math

import numpy as np
import pytest
import torch
from reference import per_example_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_cases import Images, Linear, arguments, tiny_vit, trainer, weights
from transformers import Trainer, TrainerCallback

from hf_dpvision import DPTrainer, accounting
from hf_dpvision.clipping import Flat
from hf_dpvision.errors import ArgumentRefused, BudgetExceeded, ModelRefused
from hf_dpvision.mechanism import FixedRandomness
from hf_dpvision.noise import NoiseSource
from hf_dpvision.optimising import OptimisingTrainer
from hf_dpvision.publishing import PublishingTrainer
from hf_dpvision.sampling import LogicalBatch, PoissonSampler
from hf_dpvision.stating import StatingTrainer


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """Trainer collects garbage at every start; without the imported libraries' objects that is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def draws(size: int, batch: int, steps: int, seed: int = 0) -> list[np.ndarray]:
    """The logical batches of the first `train()` of a trainer with this fixed randomness."""
    sampler = PoissonSampler(FixedRandomness(seed).sampling_key(1), size, batch / size)
    return [sampler.draw(step) for step in range(steps)]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy `[n]`."""
    outputs = model(pixel_values=batch["pixel_values"])
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def by_hand(
    model: nn.Module, data: Images, batch: int, steps: int, rate: float, sigma: float, clip: float
) -> nn.Module:
    """DP-SGD written out: one example at a time, the noise of seed 0, division by the expected batch size."""
    noise, style = FixedRandomness(0).noise_source(torch.device("cpu")), Flat(clip)
    for step, indices in enumerate(draws(len(data), batch, steps), start=1):
        model.train()
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        gradients = per_example_gradients(model, loss, data.batch(indices)) if len(indices) else []
        for gradient in gradients:
            squared = sum(g.double().square().sum() for g in gradient.values())
            if torch.isfinite(squared):
                for name, value in gradient.items():
                    sums[name] += style.factors(squared[None])[0] * value
        source = noise(step)
        for name, parameter in model.named_parameters():
            noisy = sums[name] + source.normal(parameter.shape, sigma * clip)
            parameter.data -= rate * noisy / batch
    return model


@pytest.mark.parametrize("batch", [8, 1])
def test_training_equals_dpsgd_written_out(tmp_path, batch):
    run = trainer(tmp_path, tiny_vit(), logical_batch_size=batch, max_steps=12, per_sample_max_grad_norm=0.7)
    run.train()
    expected = by_hand(tiny_vit(), run.train_dataset, batch, steps=12, rate=0.1, sigma=1.0, clip=0.7)
    assert torch.allclose(weights(run.model), weights(expected), atol=2e-6)
    sizes = [len(indices) for indices in draws(64, batch, 12)]
    assert batch == 8 or 0 in sizes  # an empty draw is a step of pure noise
    assert run.epsilon(1e-5) == accounting.epsilon(
        sample_rate=batch / 64, noise_multiplier=1.0, steps=12, delta=1e-5, accountant="rdp"
    )


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("physical", [1, 4, 16])
def test_microbatch_size_changes_nothing(tmp_path, physical, passes):
    run = trainer(tmp_path / "a", per_device_train_batch_size=physical, backward_passes=passes)
    run.train()
    other = trainer(tmp_path / "b", per_device_train_batch_size=64)
    other.train()
    assert torch.allclose(weights(run.model), weights(other.model), atol=1e-6)


def test_exactly_the_drawn_examples_are_loaded(tmp_path):
    data = Images()
    trainer(tmp_path, Linear(), train_dataset=data, max_steps=20).train()
    assert data.seen[0] == 0  # for its shape
    assert data.seen[1:] == np.concatenate(draws(64, 8, 20)).tolist()


def test_workers_change_nothing(tmp_path):
    results = []
    for workers in (0, 2):
        torch.manual_seed(0)
        run = trainer(tmp_path / str(workers), Linear(), max_steps=20, dataloader_num_workers=workers)
        run.train()
        results.append(weights(run.model))
    assert torch.equal(*results)


def test_an_example_that_is_not_finite_contributes_nothing_and_the_run_goes_on(tmp_path):
    data = Images()
    data.pixels[::3] = float("nan")
    data.pixels[1::9] = float("inf")
    run = trainer(tmp_path, train_dataset=data, max_steps=6)
    run.train()
    expected = by_hand(tiny_vit(), data, 8, steps=6, rate=0.1, sigma=1.0, clip=1.0)
    assert torch.isfinite(weights(run.model)).all()
    assert torch.allclose(weights(run.model), weights(expected), atol=2e-6)


def test_a_label_outside_the_classes_contributes_nothing_at_run_time(tmp_path):
    results = []
    for wrong in (-1, 99, -100):
        data = Images()
        data.labels[:32] = wrong
        torch.manual_seed(0)
        run = trainer(tmp_path / str(wrong), Linear(), train_dataset=data)
        run.train()
        results.append(weights(run.model))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_released_noise_has_the_stated_standard_deviation(tmp_path):
    # 40 steps on data whose gradients are zero (NaN pixels): only noise is released. False-positive rate 1e-6.
    data = Images()
    data.pixels[:] = float("nan")
    model = Linear()
    start = weights(model)
    run = trainer(
        tmp_path, model, train_dataset=data, max_steps=40, noise_multiplier=1.5, per_sample_max_grad_norm=0.3, seed=7
    )
    run.train()
    std = 0.1 * 1.5 * 0.3 / 8 * math.sqrt(40)
    statistic = float(((weights(run.model) - start) / std).double().square().mean())
    assert abs(statistic - 1) < 4.9 * math.sqrt(2 / start.numel())


def test_two_runs_with_the_same_seed_have_different_noise(tmp_path):
    results = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        run = trainer(tmp_path / name, Linear(), seed=None, logical_batch_size=64)  # everyone takes part
        run.train()
        results.append(weights(run.model))
    difference = results[0] - results[1]  # only the noise can differ
    assert (difference != 0).all()


def test_the_baseline_equals_sgd_on_the_same_draws(tmp_path):
    run = trainer(tmp_path, disable_dp=True, noise_multiplier=None, target_delta=None, max_steps=12)
    run.train()
    model, data = tiny_vit().train(), run.train_dataset
    for indices in draws(64, 8, 12):
        gradients = torch.autograd.grad(loss(model, data.batch(indices)).sum() / 8, list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.data -= 0.1 * gradient
    assert torch.allclose(weights(run.model), weights(model), atol=1e-6)
    assert run.epsilon().upper == math.inf and run.epsilon(1e-5).upper == math.inf


def test_the_sum_is_divided_by_the_expected_and_not_by_the_drawn_size(tmp_path):
    run = trainer(tmp_path, Linear(), disable_dp=True, max_steps=1, learning_rate=1.0)
    start = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    reference = Linear()
    reference.load_state_dict(start)
    run.train()
    (indices,) = draws(64, 8, 1)
    loss(reference, run.train_dataset.batch(indices)).sum().backward()
    moved = start["head.weight"] - run.model.head.weight
    assert len(indices) != 8 and torch.allclose(moved, reference.head.weight.grad / 8, atol=1e-6)


class StopAfter(TrainerCallback):
    """Stops training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.steps:
            control.should_training_stop = True


def test_epsilon_is_that_of_the_executed_steps(tmp_path):
    run = trainer(tmp_path, Linear(), max_steps=10, callbacks=[StopAfter(3)])
    assert run.epsilon().upper == 0
    run.train()
    expected = accounting.epsilon(sample_rate=1 / 8, noise_multiplier=1.0, steps=3, delta=1e-4, accountant="rdp")
    assert run.epsilon() == expected


def test_a_second_call_continues_the_ledger_with_other_draws(tmp_path):
    data = Images()
    run = trainer(tmp_path, Linear(), train_dataset=data)
    run.train()
    first = len(data.seen)
    run.train()
    assert run.epsilon() == accounting.epsilon(
        sample_rate=1 / 8, noise_multiplier=1.0, steps=8, delta=1e-4, accountant="rdp"
    )
    assert data.seen[1:first] != data.seen[first + 1 :]


def test_calibration_meets_the_target_for_the_planned_steps(tmp_path):
    planned = {"num_train_epochs": 1.2, "max_steps": -1}
    run = trainer(tmp_path, Linear(), noise_multiplier=None, target_epsilon=4.0, accountant="prv", **planned)
    run.train()
    assert run._run.ledger.steps == math.ceil(1.2 * 8)
    assert 3.9 < run.epsilon().upper <= 4.0
    assert run.state.log_history[-1]["epsilon"] == run.epsilon().upper


def test_a_calibrated_budget_is_not_exceeded_by_further_calls(tmp_path):
    run = trainer(tmp_path, Linear(), noise_multiplier=None, target_epsilon=4.0, max_steps=6, callbacks=[StopAfter(4)])
    run.train()
    with pytest.raises(BudgetExceeded, match="At most 2 are left"):
        run.train()
    run.args.logical_batch_size = 16
    with pytest.raises(ArgumentRefused, match="logical_batch_size"):
        run.train()
    run.args.logical_batch_size = 8
    run.args.max_steps = 2
    run.train()
    assert run._run.ledger.steps == 6 and run.epsilon().upper <= 4.0


def test_the_step_after_the_planned_ones_is_refused(tmp_path):
    run = trainer(tmp_path, Linear())
    run.train()
    before = weights(run.model)
    with pytest.raises(BudgetExceeded, match="Step 5"):
        run.training_step(run.model, LogicalBatch(iter(())))
    assert run._run.ledger.steps == 4 and torch.equal(before, weights(run.model))


def test_a_step_is_charged_before_its_noise_is_drawn(tmp_path, monkeypatch):
    run = trainer(tmp_path, Linear())

    def fails(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(NoiseSource, "normal", fails)
    with pytest.raises(RuntimeError, match="power cut"):
        run.train()
    assert run._run.ledger.steps == 1


def test_an_unreachable_target_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, Linear(), noise_multiplier=None, target_epsilon=1e-9, target_delta=1e-12, max_steps=1000)
    with pytest.raises(ArgumentRefused, match="cannot be reached"):
        run.train()
    assert run._run.ledger.steps == 0


def test_no_step_at_all_is_refused(tmp_path):
    for changes in ({"max_steps": 0}, {"max_steps": -1, "num_train_epochs": 0}):
        with pytest.raises(ArgumentRefused, match="no step"):
            trainer(tmp_path, Linear(), **changes).train()


class Mixing(Linear):
    """Subtracts the mean over the batch."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits = super().forward(pixel_values)
        return logits - logits.mean(0)


class Counting(Linear):
    """Keeps a running mean of its inputs in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * pixel_values.mean().detach()
        return super().forward(pixel_values)


@pytest.mark.parametrize("model", [Mixing(), Counting()])
def test_a_model_that_fails_the_check_on_random_inputs_is_refused(tmp_path, model):
    data = Images()
    run = trainer(tmp_path, model, train_dataset=data, self_check=True)
    with pytest.raises(ModelRefused):
        run.train()
    assert run._run.ledger.steps == 0
    assert data.seen == [0]  # for its shape


def test_the_check_leaves_the_model_and_the_draws_alone(tmp_path):
    results = []
    for check in (True, False):
        run = trainer(tmp_path / str(check), self_check=check)
        run.train()
        results.append(weights(run.model))
    assert torch.equal(*results)


def test_no_private_statistic_is_logged_or_saved(tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr("hf_dpvision.mechanism.new_key", lambda: keys.append(bytes(range(100, 132))) or keys[-1])
    run = trainer(
        tmp_path,
        seed=None,
        eval_dataset=Images(10),
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        eval_data="public",
    )
    result = run.train()
    run.save_model()
    run.save_state()
    run.save_metrics("train", result.metrics)
    run.create_model_card()
    assert math.isnan(result.training_loss) and "train_loss" not in result.metrics
    allowed = {
        "epsilon", "epoch", "step", "learning_rate", "grad_norm", "eval_loss", "eval_runtime", "train_runtime",
        "eval_samples_per_second", "eval_steps_per_second", "train_samples_per_second", "train_steps_per_second",
        "eval_model_preparation_time",
    }  # fmt: skip
    assert {name for logs in run.state.log_history for name in logs} <= allowed
    for path in [*tmp_path.rglob("trainer_state.json")]:
        state = json.loads(path.read_text())
        assert (state["total_flos"], state["num_input_tokens_seen"]) == (0, 0)
        assert {name for logs in state["log_history"] for name in logs} <= allowed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and len(keys) == 1 and tmp_path / "privacy" / "ledger.jsonl" in files
    for path in files:
        content = path.read_bytes()
        assert b"train_loss" not in content and keys[0] not in content and keys[0].hex().encode() not in content


def test_the_statement_lies_beside_every_file_of_weights(tmp_path):
    run = trainer(tmp_path, seed=None, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model()
    folders = {path.parent for path in tmp_path.rglob("model.safetensors")}
    assert len(folders) == 3
    steps = {folder.name: json.loads((folder / "privacy.json").read_text())["steps"] for folder in folders}
    assert steps == {"checkpoint-2": 2, "checkpoint-4": 4, tmp_path.name: 4}


def test_the_statement_says_what_was_done(tmp_path):
    run = trainer(tmp_path, Linear(), seed=None, max_steps=6, clipping="automatic", per_sample_max_grad_norm=0.5)
    run.model.head.bias.requires_grad_(False)
    run.train()
    said = run.privacy_statement()
    assert said["guarantee"]["epsilon"] == run.epsilon().upper and said["guarantee"]["delta"] == 1e-4
    assert said["guarantee"]["gdp"]["kind"] == "upper-bound" and 0 < said["guarantee"]["gdp"]["mu"] < 6**0.5
    assert said["sampling"]["rate"] == 1 / 8 and said["sampling"]["dataset_size"] == 64
    assert said["noise"]["multiplier"] == 1.0 and said["noise"]["std"] == 0.5
    assert said["clipping"]["sensitivity"] == 0.5 and said["clipping"]["function"] == "automatic"
    assert said["steps"] == 6 and said["unsafe_flags"] == []
    assert said["trainable_parameters"] == {
        "scope": "subset", "trained": 3 * 768, "frozen": 3,
        "trained_tensors": {"head.weight": 1}, "frozen_tensors": {"head.bias": 1},
    }  # fmt: skip
    assert "T = 6 steps" in said["claim"] and "zeroed out" in said["claim"] and "N = 64" in said["claim"]
    assert json.loads(json.dumps(said, allow_nan=False)) == said


def test_without_privacy_or_secrecy_the_statement_claims_nothing(tmp_path):
    for changes, flag in (({"disable_dp": True, "seed": None}, "disable_dp"), ({"seed": 0}, "fixed_randomness")):
        run = trainer(tmp_path, Linear(), **changes)
        run.train()
        said = run.privacy_statement()
        assert said["guarantee"]["epsilon"] == "inf" and said["unsafe_flags"] == [flag]
        assert "infinite" in said["claim"] and "infinite" in run.planned_claim()


def test_before_training_nothing_has_been_spent(tmp_path):
    run = trainer(tmp_path, Linear(), seed=None)
    run.save_model()
    said = json.loads((tmp_path / "privacy.json").read_text())
    assert said["guarantee"]["epsilon"] == 0 and said["steps"] == 0 and "no step yet" in run.planned_claim()
    run.log({"loss": 1.0})
    assert "loss" not in run.state.log_history[-1]


def test_weights_once_trained_without_privacy_stay_unprotected(tmp_path):
    run = trainer(tmp_path, Linear(), seed=None, disable_dp=True)
    run.train()
    run.args.disable_dp = False
    run.train()
    assert run.epsilon().upper == math.inf and run.privacy_statement()["guarantee"]["epsilon"] == "inf"


def test_the_claim_is_printed_before_the_first_step(tmp_path, capsys):
    trainer(tmp_path, Linear(), seed=None).train()
    printed = capsys.readouterr().out
    claim = printed.index("differential privacy: epsilon <=")
    assert "q = 0.125" in printed and "T = 4 steps" in printed and claim < printed.index("train_runtime")


def test_epsilon_stands_in_the_progress_bar(tmp_path, capsys):
    trainer(tmp_path, Linear(), seed=None, disable_tqdm=False, logging_steps=2).train()
    assert "epsilon <= " in capsys.readouterr().err


def test_logged_epsilon_never_understates(tmp_path):
    run = trainer(tmp_path, Linear(), max_steps=90, logging_steps=1, logical_batch_size=2)
    run.train()
    shown = {logs["step"]: logs["epsilon"] for logs in run.state.log_history[:-1]}
    assert len(shown) == 90 and len(set(shown.values())) <= 24
    for step in (1, 7, 45, 89, 90):
        spent = accounting.epsilon(
            sample_rate=1 / 32, noise_multiplier=1.0, steps=step, delta=1e-4, accountant="rdp"
        ).upper
        assert shown[step] >= spent
    assert shown[90] == run.epsilon().upper


def test_evaluation_measures_loss_and_accuracy(tmp_path):
    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    data = Images(10)
    for model in (tiny_vit(), Linear()):
        run = DPTrainer(
            model, arguments(tmp_path), train_dataset=Images(), eval_dataset=data, compute_metrics=accuracy
        )
        metrics = run.evaluate()
        with torch.no_grad():
            expected = loss(model.eval(), data.batch(torch.arange(10)))
        assert metrics["eval_loss"] == pytest.approx(float(expected.mean()), rel=0.05)  # padded last batch
        assert 0 <= metrics["eval_accuracy"] <= 1 and "epsilon" not in metrics


def test_a_users_loss_per_example_is_what_is_clipped(tmp_path):
    def weighted(outputs, labels, num_items_in_batch=None):
        return 2 * F.cross_entropy(outputs.logits, labels, reduction="none")

    run = trainer(tmp_path / "a", compute_loss_func=weighted, clipping="automatic")
    run.train()
    plain = trainer(tmp_path / "b")
    assert torch.allclose(
        run.per_sample_loss(plain.model, run.train_dataset.batch([0, 1])),
        2 * loss(plain.model, run.train_dataset.batch([0, 1])),
    )


def test_bfloat16_autocast_stays_close_to_float32(tmp_path):
    results = []
    for bf16 in (False, True):
        run = trainer(tmp_path / str(bf16), bf16=bf16, self_check=True)
        run.train()
        results.append(weights(run.model))
    assert results[1].dtype == torch.float32
    assert 0 < (results[0] - results[1]).abs().max() < 2e-3


def test_gradients_are_written_for_an_empty_batch_too(tmp_path):
    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(all(p.grad is not None and (p.grad != 0).all() for p in kwargs["model"].parameters()))

    seen: list[bool] = []
    trainer(tmp_path, Linear(), max_steps=12, logical_batch_size=1, callbacks=[Look()]).train()
    assert seen == [True] * 12 and 0 in [len(indices) for indices in draws(64, 1, 12)]


def test_overridden_methods_still_exist_upstream():
    own = {**vars(StatingTrainer), **vars(PublishingTrainer), **vars(OptimisingTrainer), **vars(DPTrainer)}
    for name, method in own.items():
        overridden = getattr(Trainer, name, None)
        if not callable(method) or overridden is None or name in ("__init__", "hyperparameter_search"):
            continue
        ours, theirs = inspect.signature(method).parameters, inspect.signature(overridden).parameters
        later = {"private"} - set(theirs)  # of push_to_hub, from transformers 5.23 on
        assert [one for one in ours if one not in later] == list(theirs), name
    required = {
        "get_train_dataloader", "get_batch_samples", "training_step", "compute_loss", "_wrap_model", "_save",
        "_prepare_for_training", "_load_from_checkpoint", "_load_best_model", "_save_checkpoint", "_clip_grad_norm",
        "floating_point_ops", "get_total_train_batch_size", "log", "_finalize_training", "create_model_card", "train",
        "push_to_hub", "_push_from_checkpoint", "predict", "evaluate",
    }  # fmt: skip
    assert required <= set(own) & set(vars(Trainer))


def test_the_signature_is_that_of_trainer():
    ours, theirs = inspect.signature(DPTrainer.__init__).parameters, inspect.signature(Trainer.__init__).parameters
    assert [name for name in ours if name != "randomness"] == list(theirs)


def test_the_check_is_made_in_full_precision_also_after_an_evaluation_in_half(tmp_path):
    run = trainer(tmp_path, bf16=True, self_check=True, eval_dataset=Images(8))
    run.evaluate()
    run.train()
    run.train()
    assert run._run.ledger.steps == 8
