"""Losses of single examples have transformers' mean, and one entry per example."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_pt_utils import LabelSmoother

from hf_dpvision.errors import ArgumentRefused, ModelRefused
from hf_dpvision.losses import cross_entropy, example_losses, logits_of


class Config:
    """What transformers' loss reads."""

    def __init__(self, problem_type: str | None, num_labels: int) -> None:
        self.problem_type, self.num_labels = problem_type, num_labels


CASES = [
    (None, torch.randint(5, (7,)), 5),
    ("single_label_classification", torch.randint(5, (7,)), 5),
    (None, torch.rand(7, 5), 5),
    ("multi_label_classification", torch.randint(2, (7, 5)).float(), 5),
    (None, torch.rand(7), 1),
    ("regression", torch.rand(7, 5), 5),
]


@pytest.mark.parametrize(("problem_type", "labels", "outputs"), CASES)
def test_the_mean_is_the_loss_of_transformers(problem_type, labels, outputs):
    logits = torch.randn(7, outputs)
    losses = example_losses(logits, labels, problem_type)
    expected = ForSequenceClassificationLoss(labels, logits, Config(problem_type, outputs))
    assert losses.shape == (7,) and torch.allclose(losses.mean(), expected)


@pytest.mark.parametrize(("problem_type", "labels", "outputs"), CASES)
def test_each_entry_depends_on_its_own_example(problem_type, labels, outputs):
    logits = torch.randn(7, outputs)
    whole = example_losses(logits, labels, problem_type)
    alone = [example_losses(logits[[i]], labels[[i]], problem_type) for i in range(7)]
    assert torch.allclose(whole, torch.cat(alone))


def test_no_example_gives_no_loss():
    assert example_losses(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), None).shape == (0,)


def test_smoothing_is_that_of_transformers():
    logits, labels = torch.randn(7, 5), torch.randint(5, (7,))
    expected = LabelSmoother(epsilon=0.1)(ImageClassifierOutput(logits=logits), labels)
    assert torch.allclose(example_losses(logits, labels, None, 0.1).mean(), expected)


@pytest.mark.parametrize("wrong", [-100, -1, 5, 10**6])
def test_a_label_outside_the_classes_has_loss_and_gradient_zero(wrong):
    logits = torch.randn(3, 5, requires_grad=True)
    losses = cross_entropy(logits, torch.tensor([1, wrong, 2]), 0.1)
    losses.sum().backward()
    assert losses[1] == 0 and (logits.grad[1] == 0).all() and (logits.grad[0] != 0).all()


def test_half_precision_logits_give_single_precision_losses():
    losses = example_losses(torch.randn(3, 5).bfloat16(), torch.tensor([0, 1, 2]), None)
    assert losses.dtype == torch.float32
    assert example_losses(torch.randn(3, 5).double(), torch.tensor([0, 1, 2]), None).dtype == torch.float64


def test_an_unknown_problem_and_meaningless_smoothing_are_refused():
    logits, labels = torch.randn(3, 5), torch.rand(3, 5)
    with pytest.raises(ArgumentRefused, match="problem_type='detection'"):
        example_losses(logits, labels, "detection")
    with pytest.raises(ArgumentRefused, match="label_smoothing_factor"):
        example_losses(logits, labels, "multi_label_classification", 0.1)


def test_logits_are_found_in_each_kind_of_output():
    logits = torch.zeros(2, 3)
    for outputs in (logits, ImageClassifierOutput(logits=logits), {"logits": logits}, (logits, None)):
        assert logits_of(outputs) is logits
    for outputs in ({"features": logits}, None, (), [logits]):
        with pytest.raises(ModelRefused, match="compute_loss_func"):
            logits_of(outputs)
    assert F.cross_entropy(logits, torch.tensor([0, 1])) > 0
