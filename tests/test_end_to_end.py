"""Each kind of model trains with every default on, is saved, and is loaded back with equal logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from trainer_cases import CLASSES, Images, arguments, tiny_vit, trainer, weights
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
)

from hf_dpvision import DPTrainer, load_model
from hf_dpvision.checkpoints import load_strictly
from hf_dpvision.errors import DataRefused, ModelRefused


def logits(model: nn.Module) -> Tensor:
    """Of two fixed pictures, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(pixel_values=Images(2).pixels).logits


def tiny_timm() -> nn.Module:
    """A raw timm module, as `timm.create_model` returns it."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=CLASSES
    )


def tiny_beit() -> BeitForImageClassification:
    """A BEiT whose attention has shared relative position biases."""
    return BeitForImageClassification(
        BeitConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=8, num_labels=CLASSES, use_relative_position_bias=True,
        )
    )  # fmt: skip


def tiny_swin() -> Swinv2ForImageClassification:
    """A Swin v2 of one stage."""
    return Swinv2ForImageClassification(
        Swinv2Config(
            image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4, num_labels=CLASSES
        )
    )


DEFAULTS = {"self_check": True, "seed": None, "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "epoch"}


@pytest.mark.parametrize("build", [tiny_vit, tiny_beit, tiny_timm])
def test_a_model_trains_and_reloads_with_equal_logits(tmp_path, build):
    model = build()
    before = weights(model)
    run = trainer(tmp_path, model, **DEFAULTS)
    run.train()
    run.save_model()
    assert not torch.equal(before, weights(run.model))
    reloaded = [AutoModelForImageClassification.from_pretrained(tmp_path), load_model(str(tmp_path))]
    for other in reloaded:
        assert torch.equal(logits(run.model), logits(other))
    assert json.loads((tmp_path / "privacy.json").read_text())["guarantee"]["epsilon"] == run.epsilon().upper


def test_adapters_train_and_reload_with_equal_logits(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    run = trainer(tmp_path, peft.get_peft_model(tiny_vit(), config), **DEFAULTS)
    run.train()
    run.save_model()
    reloaded = peft.PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert torch.allclose(logits(run.model), logits(reloaded), atol=1e-6)
    assert not torch.allclose(logits(run.model), logits(tiny_vit()), atol=1e-3)
    said = json.loads((tmp_path / "privacy.json").read_text())
    assert said["trainable_parameters"]["scope"] == "subset" and said["steps"] == 4


@pytest.mark.parametrize("remove_unused_columns", [False, True])
def test_a_huggingface_data_set_with_a_transform_trains(tmp_path, remove_unused_columns):
    datasets = pytest.importorskip("datasets")
    images = Images(40)
    rows = datasets.Dataset.from_dict({"row": list(range(40)), "name": [f"image {i}" for i in range(40)]})

    def transform(batch):
        chosen = batch["row"]
        return {
            "pixel_values": [images.pixels[row] for row in chosen],
            "labels": [int(images.labels[row]) for row in chosen],
        }

    run = trainer(
        tmp_path,
        train_dataset=rows.with_transform(transform),
        eval_dataset=rows.select(range(10)).with_transform(transform),
        remove_unused_columns=remove_unused_columns,
        self_check=True,
    )
    run.train()
    assert run._run.ledger.steps == 4
    if not remove_unused_columns:  # Trainer drops columns before the transform can see them
        assert run.evaluate()["eval_loss"] > 0


def test_a_label_outside_the_classes_is_refused_before_the_first_step(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = Images(20)
    columns = {"pixel_values": images.pixels.tolist(), "labels": [0, 1, 2, 1, 7] * 4}
    run = trainer(tmp_path, train_dataset=datasets.Dataset.from_dict(columns).with_format("torch"))
    with pytest.raises(DataRefused, match="example 4 .* 7, is outside the 3 classes"):
        run.train()
    assert run._run.ledger.steps == 0
    columns["labels"] = [0, 1, 2, 1, 2] * 4
    trainer(tmp_path, train_dataset=datasets.Dataset.from_dict(columns).with_format("torch")).train()


def test_the_best_checkpoint_on_public_data_is_loaded_completely(tmp_path):
    run = trainer(
        tmp_path, tiny_beit(), eval_dataset=Images(10), eval_data="public", load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=None,
        learning_rate=3.0,
    )  # fmt: skip
    run.train()
    best = AutoModelForImageClassification.from_pretrained(run.state.best_model_checkpoint)
    assert torch.equal(weights(run.model.eval()), weights(best))


@pytest.mark.parametrize("build", [tiny_vit, tiny_beit, tiny_swin])
def test_saved_weights_are_loaded_strictly(tmp_path, build):
    model = build()
    model.save_pretrained(tmp_path)
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    load_strictly(other, tmp_path)
    restored = other.state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in model.state_dict().items())


def test_weights_of_another_shape_are_refused(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    model.classifier = nn.Linear(16, 5)
    with pytest.raises(ModelRefused, match="classifier"):
        load_strictly(model, tmp_path)


def test_weights_of_a_plain_module_are_loaded_strictly(tmp_path):
    import safetensors.torch

    source, other = nn.Linear(2, 2), nn.Linear(2, 2)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    load_strictly(other, tmp_path)
    assert torch.equal(source.weight, other.weight)
    with pytest.raises(ModelRefused, match="left over"):
        load_strictly(nn.Linear(2, 2, bias=False), tmp_path)


def test_the_card_is_written_from_the_statement(tmp_path):
    run = trainer(tmp_path, tiny_vit(), seed=None)
    run.train()
    run.create_model_card(dataset="uoft-cs/cifar10", finetuned_from="google/vit-base-patch16-224", license="mit")
    card = (Path(tmp_path) / "README.md").read_text()
    assert "differential_privacy" in card and "uoft-cs/cifar10" in card


def test_a_model_from_model_init_is_checked_and_wrapped(tmp_path):
    run = DPTrainer(model_init=tiny_timm, args=arguments(tmp_path), train_dataset=Images())
    run.train()
    assert run.model.config.num_labels == CLASSES and run.epsilon().upper > 0
    with pytest.raises(ModelRefused, match="BatchNorm"):
        DPTrainer(model_init=lambda: nn.BatchNorm1d(3), args=arguments(tmp_path), train_dataset=Images())
