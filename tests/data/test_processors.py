"""The model's own settings are read, and what replaces them is saved with the model."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessor,
    ViTConfig,
    ViTForImageClassification,
)

from hf_dpvision import load_model
from hf_dpvision.data import ImageTransform, model_input
from hf_dpvision.errors import DataRefused


def _beit(size: int = 16) -> BeitForImageClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BeitConfig(image_size=size, patch_size=8, num_labels=2, use_relative_position_bias=True, **sizes)
    return BeitForImageClassification(config).eval()


def _vit(size: int) -> ViTForImageClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=size, patch_size=8, num_labels=2, **sizes)).eval()


def _timm(size: int) -> torch.nn.Module:
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, embed_dim=16, depth=1, num_heads=2, num_classes=2
    )
    return load_model(module)


def _picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((30, 24))


def test_timm_settings_come_from_the_config_and_go_back_to_it():
    model = _timm(32)
    wanted = model_input(model, image_size=32, crop_pct=1.0)
    assert wanted.processor is None and wanted.preprocessing.size == (32, 32) and wanted.preprocessing.resize == 32
    assert tuple(model.config.pretrained_cfg["input_size"]) == (3, 32, 32)
    assert model.config.pretrained_cfg["crop_pct"] == 1.0


@pytest.mark.parametrize("crop_pct", [None, 1.0, 0.5])
def test_the_saved_processor_does_what_was_done_in_training(tmp_path, crop_pct):
    BeitImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path)
    wanted = model_input(_beit(), str(tmp_path), image_size=16, crop_pct=crop_pct)
    wanted.processor.save_pretrained(tmp_path / "saved")
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "saved")(_picture(), return_tensors="pt")["pixel_values"]
    ours = ImageTransform(wanted.preprocessing)(_picture())
    assert theirs.shape == (1, 3, 16, 16) and (theirs[0] - ours).abs().max() < 0.05


def test_a_processor_for_another_size_than_the_model_is_refused(tmp_path):
    BeitImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(DataRefused, match="32 x 32 pixels.*set image_size"):
        model_input(_vit(16), str(tmp_path))
    with pytest.raises(DataRefused, match="48 x 48"):
        model_input(_timm(32), image_size=48)


def test_a_model_without_a_processor_is_refused(tmp_path):
    with pytest.raises(DataRefused, match="image_processor_name"):
        model_input(_beit(), str(tmp_path))


def test_the_model_is_left_as_it_was(tmp_path):
    BeitImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model = _beit().train()
    model_input(model, str(tmp_path))
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    model(pixel_values=torch.zeros(1, 3, 16, 16)).logits.sum().backward()  # nothing cached stops the gradient
