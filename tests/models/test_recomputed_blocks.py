"""Activation checkpointing, every family that has it: bit for bit the norms and sums of a run without it."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, classification_loss, images, perturbed
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from hf_dpvision import clipped_gradient, clipping
from hf_dpvision.activation_checkpointing import checkpoint_activations
from hf_dpvision.errors import CaptureError
from hf_dpvision.fitting import peak_bytes


FLAT = clipping.Flat(5.0)
WITHOUT = {"vgg", "transformers_convnext", "transformers_resnet_frozen_batch_norm"}  # these classes do not offer it
NESTED = {"davit"}  # checkpointed blocks inside checkpointed stages
SUPPORTED = [case for case in CASES if case.name not in WITHOUT | NESTED]


def switched_on(model: nn.Module) -> nn.Module:
    """The model with activation checkpointing, by the method of its library."""
    if isinstance(model, PreTrainedModel):
        checkpoint_activations(model, None)
    else:
        offering = next(module for module in model.modules() if hasattr(module, "set_grad_checkpointing"))
        offering.set_grad_checkpointing()
    return model.train()


@pytest.fixture
def blocks_run_again(monkeypatch) -> list[int]:
    """Counts the checkpointed blocks, so that a switch that does nothing is noticed."""
    blocks: list[int] = []
    original = torch.utils.checkpoint._CheckpointFrame

    class Counted(original):
        def __init__(self, *args: object) -> None:
            blocks.append(len(blocks))
            super().__init__(*args)

    monkeypatch.setattr(torch.utils.checkpoint, "_CheckpointFrame", Counted)
    return blocks


@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.name)
def test_norms_and_sums_are_bit_identical_to_those_without_checkpointing(case: Case, blocks_run_again) -> None:
    model = perturbed(case.build(), torch.float64).train()
    batch = images(case.image_size, torch.float64)

    def results() -> list:
        return [
            clipped_gradient(model, classification_loss, batch, clipping=FLAT, norm_rule=rule, backward_passes=passes)
            for rule, passes in (("auto", 1), ("ghost", 2))
        ]

    plain = results()
    assert not blocks_run_again
    switched_on(model)
    for expected, found in zip(plain, results(), strict=True):
        assert torch.equal(expected.norms, found.norms)
        assert all(torch.equal(value, found.gradients[name]) for name, value in expected.gradients.items())
    assert blocks_run_again


@pytest.mark.parametrize("case", [case for case in CASES if case.name in NESTED], ids=lambda case: case.name)
def test_checkpointed_blocks_inside_one_another_are_refused(case: Case) -> None:
    model = switched_on(perturbed(case.build(), torch.float64))
    with pytest.raises(CaptureError, match="activation checkpointing.*inside one another.*Switch"):
        clipped_gradient(model, classification_loss, images(case.image_size, torch.float64), clipping=FLAT)


def vit(blocks: int, dropout: float = 0.0) -> nn.Module:
    """A ViT whose activations weigh more than its parameters."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=blocks, num_attention_heads=2, intermediate_size=64, image_size=32,
        patch_size=4, num_labels=5, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return ViTForImageClassification(config).train()


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of the logits, `[n]`."""
    logits = model(pixel_values=batch["pixel_values"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


@pytest.mark.parametrize("passes", [1, 2])
def test_a_block_run_again_drops_what_it_dropped_at_first(passes: int) -> None:
    model, batch = vit(2, dropout=0.3), images(32, torch.float32)
    found = []
    for change in (lambda model: model, switched_on):
        change(model)
        torch.manual_seed(3)
        found.append(clipped_gradient(model, loss, batch, clipping=FLAT, backward_passes=passes).norms)
    assert torch.equal(*found)


def test_two_passes_with_checkpointing_hold_far_less_than_without() -> None:
    batch = images(32, torch.float32)
    plain, checkpointed = vit(8), switched_on(vit(8))

    def peak(model: nn.Module) -> int:
        return peak_bytes(
            lambda: clipped_gradient(model, loss, batch, clipping=FLAT, backward_passes=2), torch.device("cpu")
        )

    assert peak(checkpointed) < 0.6 * peak(plain)
