"""Several views of each drawn image: one example still, whose gradient is the mean over its views."""

from __future__ import annotations

import pytest
import torch
from trainer_cases import Images, Linear, tiny_vit, trainer, weights

from hf_dpvision.errors import ArgumentRefused


class Flipping(Images):
    """Every other time an image is read, it is upside down."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        if self.seen.count(index) % 2 == 0:
            example["pixel_values"] = example["pixel_values"].flip(1)
        return example


def expected_sum(model: Linear, data: Images, bound: float) -> torch.Tensor:
    """The loop: one example after the other, the mean loss of its two views, clipped as one."""
    total = torch.zeros_like(model.head.weight)
    for index, picture in enumerate(data.pixels):
        logits = model(torch.stack([picture, picture.flip(1)]))
        loss = torch.nn.functional.cross_entropy(logits, data.labels[[index, index]])
        weight, bias = torch.autograd.grad(loss, [model.head.weight, model.head.bias])
        norm = (weight.square().sum() + bias.square().sum()).sqrt()
        total += weight * min(1.0, bound / float(norm))
    return total


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_is_that_of_the_loop_over_examples(tmp_path, workers):
    model = Linear()
    start = model.head.weight.detach().clone()
    run = trainer(
        tmp_path, model, train_dataset=Flipping(), augmentation_multiplicity=2, max_steps=1, logical_batch_size=64,
        noise_multiplier=1e-6, per_sample_max_grad_norm=0.5, dataloader_num_workers=workers, self_check=False,
    )  # fmt: skip
    before = Linear()
    before.load_state_dict(model.state_dict())
    run.train()
    moved = (start - model.head.weight.detach()) / 0.1 * 64  # learning rate, expected batch size
    assert (moved - expected_sum(before, Images(), 0.5)).abs().max() < 1e-4


def test_identical_views_change_nothing_and_cost_no_privacy(tmp_path):
    one = trainer(tmp_path / "one", tiny_vit())
    four = trainer(tmp_path / "four", tiny_vit(), augmentation_multiplicity=4, self_check=True)
    one.train(), four.train()
    assert (weights(one.model) - weights(four.model)).abs().max() < 1e-6
    assert one.epsilon() == four.epsilon()


def test_the_physical_batch_counts_views_and_keeps_those_of_an_example_together(tmp_path, monkeypatch):
    sizes = []

    def notes(self, model, inputs):
        sizes.append(len(inputs["labels"]))
        views = inputs["labels"].view(-1, 3)
        assert torch.equal(views, views[:, :1].expand_as(views))
        return original(self, model, inputs)

    run = trainer(tmp_path, Linear(), augmentation_multiplicity=3, per_device_train_batch_size=8)
    original = type(run).per_sample_loss
    monkeypatch.setattr(type(run), "per_sample_loss", notes)
    run.train()
    assert max(sizes) == 6 and all(size % 3 == 0 for size in sizes)


@pytest.mark.parametrize("views", [0, -1, 1.5, True])
def test_a_number_of_views_that_is_none_is_refused(tmp_path, views):
    with pytest.raises(ArgumentRefused, match="augmentation_multiplicity=.*whole number of at least 1"):
        trainer(tmp_path, augmentation_multiplicity=views)
