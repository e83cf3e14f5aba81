"""Pictures to tensors: the model's own resizing and normalisation, and flips and crops for training.

Every transform sees one picture. Mixing pictures (mixup, cutmix) would let one example move another one's
gradient, so there is none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataRefused


_TIMM_INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures.

    Args:
        size: height and width of the input, pixels.
        resize: an int scales the shorter edge to it, a pair scales to exactly (height, width); what is then larger
            than `size` is cropped at the centre, what is smaller is padded with black.
        mean, std: per channel, of pixel values scaled to 0..1; one entry means a grey-scale model.
        resample: Pillow's filter.
        blue_first: the model was trained on BGR pictures.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling = Image.Resampling.BICUBIC
    blue_first: bool = False

    def resized(self, image_size: int) -> Preprocessing:
        """Return the same preprocessing for square inputs of `image_size` pixels, margins scaled along."""
        factor = image_size / self.size[0]
        if isinstance(self.resize, int):
            resize: int | tuple[int, int] = round(self.resize * factor)
        else:
            resize = (round(self.resize[0] * factor), round(self.resize[1] * image_size / self.size[1]))
        return replace(self, size=(image_size, image_size), resize=resize)

    def cropped(self, fraction: float) -> Preprocessing:
        """Return the same preprocessing keeping the centre `fraction` (0, 1] of the shorter edge; 1 keeps it all."""
        if not 0 < fraction <= 1:
            raise DataRefused(f"crop_pct must lie in (0, 1], got {fraction}: it is the part of the picture to keep.")
        return replace(self, resize=round(min(self.size) / fraction))


@dataclass(frozen=True)
class Augmentation:
    """Random changes of one training picture.

    Args:
        flip: mirror left-right with probability one half.
        shift: pad by this fraction of the height and width (black), then crop back at a random place; 1/8 is the
            usual 4 pixels of 32.
    """

    flip: bool = False
    shift: float = 0.0


@dataclass(frozen=True)
class ImageTransform:
    """RGB picture -> float32 tensor [c, h, w], normalised. Picklable; the same for any number of workers."""

    preprocessing: Preprocessing
    augmentation: Augmentation = Augmentation()

    def __call__(self, picture: Image.Image) -> Tensor:
        wanted = self.preprocessing
        pixels = _to_tensor(_resize(picture, wanted.resize, wanted.resample), len(wanted.mean))
        pixels = _centre(pixels, wanted.size)
        if self.augmentation.shift > 0:
            pixels = _random_shift(pixels, self.augmentation.shift)
        if self.augmentation.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        if wanted.blue_first:
            pixels = pixels.flip(0)
        mean, std = torch.tensor(wanted.mean), torch.tensor(wanted.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]


def preprocessing_from_timm(pretrained_cfg: Mapping[str, Any]) -> Preprocessing:
    """Read timm's `pretrained_cfg` (`input_size`, `crop_pct`, `crop_mode`, `interpolation`, `mean`, `std`).

    Raises:
        DataRefused: `crop_mode` is neither `center` nor `squash`, or the interpolation is unknown.
    """
    _, height, width = pretrained_cfg.get("input_size") or (3, 224, 224)
    fraction = float(pretrained_cfg.get("crop_pct") or 0.875)
    mode = pretrained_cfg.get("crop_mode") or "center"
    interpolation = pretrained_cfg.get("interpolation") or "bicubic"
    if mode not in ("center", "squash") or interpolation not in _TIMM_INTERPOLATION:
        raise DataRefused(
            f"pretrained_cfg has {mode=} and {interpolation=}; known are crop modes center, squash and "
            f"interpolations {', '.join(_TIMM_INTERPOLATION)}: set them in the model's pretrained_cfg."
        )
    squash = (int(height / fraction), int(width / fraction))
    return Preprocessing(
        size=(height, width),
        resize=squash if mode == "squash" or height != width else squash[0],
        mean=tuple(pretrained_cfg.get("mean") or (0.485, 0.456, 0.406)),
        std=tuple(pretrained_cfg.get("std") or (0.229, 0.224, 0.225)),
        resample=_TIMM_INTERPOLATION[interpolation],
    )


def preprocessing_from_processor(settings: Mapping[str, Any]) -> Preprocessing:
    """Read the settings of a transformers image processor (`processor.to_dict()`).

    Understands `size` with `height, width` or `shortest_edge`, `crop_size`, ConvNeXt's `crop_pct`, and MobileViT's
    `do_flip_channel_order`.

    Raises:
        DataRefused: pixel values are not scaled to 0..1, or no size is given.
    """
    if not settings.get("do_rescale", True) or abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise DataRefused(
            f"the image processor has do_rescale={settings.get('do_rescale')} and "
            f"rescale_factor={settings.get('rescale_factor')}; only pixels scaled by 1/255 are supported."
        )
    size, resize = _processor_size(settings)
    normalise = bool(settings.get("do_normalize"))
    return Preprocessing(
        size=size,
        resize=resize,
        mean=tuple(settings["image_mean"]) if normalise else (0.0, 0.0, 0.0),
        std=tuple(settings["image_std"]) if normalise else (1.0, 1.0, 1.0),
        resample=Image.Resampling(int(settings.get("resample", 3))),
        blue_first=bool(settings.get("do_flip_channel_order")),
    )


def _processor_size(settings: Mapping[str, Any]) -> tuple[tuple[int, int], int | tuple[int, int]]:
    size = {name: value for name, value in dict(settings.get("size") or {}).items() if value is not None}
    resize: int | tuple[int, int]
    if "height" in size and "width" in size:
        resize = final = (size["height"], size["width"])
    elif "shortest_edge" in size:
        resize, final = size["shortest_edge"], (size["shortest_edge"],) * 2
    else:
        raise DataRefused(f"the image processor's size is {size}: give image_size, every input needs one fixed size.")
    if settings.get("do_center_crop") and settings.get("crop_size"):
        final = (settings["crop_size"]["height"], settings["crop_size"]["width"])
    elif settings.get("crop_pct") and isinstance(resize, int):  # ConvNeXt: crops below 384 pixels, squashes above
        resize = round(resize / settings["crop_pct"]) if resize < 384 else final
    return final, resize


def _resize(picture: Image.Image, resize: int | tuple[int, int], resample: Image.Resampling) -> Image.Image:
    if isinstance(resize, int):
        width, height = (resize * edge // min(picture.size) for edge in picture.size)
    else:
        height, width = resize
    return picture if picture.size == (width, height) else picture.resize((width, height), resample)


def _to_tensor(picture: Image.Image, channels: int) -> Tensor:
    pixels = np.array(picture.convert("L") if channels == 1 else picture, dtype=np.float32) / 255
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()


def _centre(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop (or pad with zeros) [c, h, w] to `size` around the centre."""
    for dim, wanted in ((1, size[0]), (2, size[1])):
        spare = pixels.shape[dim] - wanted
        if spare >= 0:
            pixels = pixels.narrow(dim, round(spare / 2), wanted)  # rounded as torchvision does
        else:
            before, after = -spare // 2, -spare - (-spare // 2)
            widths = (before, after) if dim == 2 else (0, 0, before, after)
            pixels = torch.nn.functional.pad(pixels, widths)
    return pixels


def _random_shift(pixels: Tensor, fraction: float) -> Tensor:
    height, width = pixels.shape[1:]
    down, right = max(1, round(height * fraction)), max(1, round(width * fraction))
    padded = torch.nn.functional.pad(pixels, (right, right, down, down))
    top = int(torch.randint(0, 2 * down + 1, ()))
    left = int(torch.randint(0, 2 * right + 1, ()))
    return padded[:, top : top + height, left : left + width]
