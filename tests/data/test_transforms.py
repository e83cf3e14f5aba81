"""Transforms follow the model's own settings and see one picture at a time."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import BeitImageProcessor, BitImageProcessor, ConvNextImageProcessor, MobileViTImageProcessor

from hf_dpvision.data import (
    Augmentation,
    ImageTransform,
    Preprocessing,
    preprocessing_from_processor,
    preprocessing_from_timm,
)
from hf_dpvision.errors import DataRefused


PLAIN = Preprocessing(size=(8, 8), resize=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _picture(height: int = 8, width: int = 8, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("shape", [(40, 40), (50, 40), (40, 61)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_timm_settings_give_timms_own_evaluation_transform(shape, crop_pct):
    settings = {"input_size": (3, 32, 32), "crop_pct": crop_pct, "interpolation": "bicubic", "crop_mode": "center"}
    settings |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(settings, verbose=False))
    ours = ImageTransform(preprocessing_from_timm(settings))
    assert torch.allclose(ours(_picture(*shape)), theirs(_picture(*shape)), atol=1e-6)


@pytest.mark.parametrize(
    "processor",
    [
        BeitImageProcessor(size={"height": 24, "width": 24}),
        BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24}),
        ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.75),
        MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24}),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_processor_settings_give_the_processors_own_result(processor):
    picture = _picture(64, 48).resize((40, 30))
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    ours = ImageTransform(preprocessing_from_processor(processor.to_dict()))(picture)
    assert ours.shape == theirs.shape == (3, 24, 24)
    assert (ours - theirs).abs().max() < 0.05  # theirs resizes tensors, ours pictures: rounding differs


def test_settings_that_cannot_be_followed_are_refused():
    with pytest.raises(DataRefused, match="rescale_factor"):
        preprocessing_from_processor(BeitImageProcessor(rescale_factor=1 / 127.5).to_dict())
    with pytest.raises(DataRefused, match="crop"):
        preprocessing_from_timm({"crop_mode": "border"})
    with pytest.raises(DataRefused, match="crop_pct"):
        PLAIN.cropped(0.0)


def test_another_size_scales_the_margin_along():
    own = Preprocessing(size=(224, 224), resize=256, mean=(0.0,), std=(1.0,))
    assert own.resized(112).resize == 128
    assert own.cropped(1.0).resize == 224


def test_grey_models_get_one_channel():
    grey = Preprocessing(size=(8, 8), resize=8, mean=(0.5,), std=(0.5,))
    assert ImageTransform(grey)(_picture()).shape == (1, 8, 8)


def test_without_augmentation_the_result_is_fixed():
    transform = ImageTransform(PLAIN)
    assert torch.equal(transform(_picture()), transform(_picture()))


def test_flip_mirrors_about_half_of_the_pictures_and_changes_nothing_else():
    torch.manual_seed(0)
    straight = ImageTransform(PLAIN)(_picture())
    flipped = [ImageTransform(PLAIN, Augmentation(flip=True))(_picture()) for _ in range(40)]
    mirrored = sum(torch.equal(result, straight.flip(-1)) for result in flipped)
    assert mirrored + sum(torch.equal(result, straight) for result in flipped) == 40
    assert 8 < mirrored < 32


def test_shift_moves_the_picture_by_at_most_the_fraction():
    torch.manual_seed(0)
    inner = ImageTransform(PLAIN)(_picture())[:, 3:5, 3:5]
    for _ in range(20):
        shifted = ImageTransform(PLAIN, Augmentation(shift=1 / 8))(_picture())
        assert shifted.shape == (3, 8, 8)
        windows = shifted.unfold(1, 2, 1).unfold(2, 2, 1)[:, 2:5, 2:5].flatten(1, 2).unbind(1)
        assert any(torch.equal(window, inner) for window in windows)


def test_transforms_can_be_sent_to_worker_processes():
    transform = ImageTransform(PLAIN, Augmentation(flip=True, shift=0.125))
    assert pickle.loads(pickle.dumps(transform)) == transform
