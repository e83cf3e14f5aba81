"""One stored value in, one 8-bit RGB picture out, always by the same fixed rule.

Nothing here looks at a second example: the picture of an example depends on that example alone, which is what
per-example clipping needs from the data path.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping

import numpy as np
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from ..errors import DataRefused


_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_CONVERTED_AS_THEY_ARE = ("1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX")


def read_image(value: object, index: int, part: str = "train") -> Image.Image:
    """Decode one stored value, turn it upright (EXIF) and bring it to 8-bit RGB.

    Args:
        value: what the image column holds: `{"bytes", "path"}`, bytes, a path, a PIL image, or a pixel array.
        index: position of the example, for the message.
        part: name of the split, for the message.

    Raises:
        DataRefused: the value is missing, cannot be decoded, has no pixels, or is of a kind without a fixed rule.
            The message names part and index.
    """
    where = f"example {index} of part {part!r}"
    if value is None:
        raise DataRefused(f"{where} has no image (None): remove the row, every example needs a picture.")
    try:
        image = _open(value)
        width, height = image.size
        if width * height == 0:
            raise ValueError(f"it has {width} x {height} pixels")
        return to_rgb(image)
    except Exception as error:  # a broken file makes Pillow raise a dozen types; the index is what the user needs
        raise DataRefused(
            f"{where} cannot be read as an image ({type(error).__name__}: {error}): repair or remove it. "
            "In training it would contribute nothing, and nobody would be told."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring any Pillow mode to 8-bit RGB, deterministically.

    Transparent pixels are laid over white; 16-bit grey keeps its upper eight bits (also when no value exceeds 255:
    the rule must not depend on the content); animated files give their first frame.

    Raises:
        DataRefused: a mode without a fixed range (`F`) or without a plain conversion (`LAB`).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT:
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if image.mode in _CONVERTED_AS_THEY_ARE:
        return image.convert("RGB")
    raise DataRefused(
        f"mode {image.mode!r} has no fixed conversion to 8-bit RGB: convert the files to 8-bit grey or RGB first."
    )


def _open(value: object) -> Image.Image:
    if isinstance(value, Image.Image):
        return ImageOps.exif_transpose(value)
    if isinstance(value, bytes):
        return ImageFeature().decode_example({"bytes": value, "path": None})
    if isinstance(value, str):
        return ImageFeature().decode_example({"bytes": None, "path": value})
    if isinstance(value, Mapping):
        return ImageFeature().decode_example({"bytes": value["bytes"], "path": value["path"]})
    return Image.fromarray(_pixels(np.asarray(value)))


def _pixels(array: np.ndarray) -> np.ndarray:
    """Check a pixel array [h, w], [h, w, c] or [c, h, w] and return it as uint8 [h, w] or [h, w, 3 or 4]."""
    if not issubclass(array.dtype.type, numbers.Integral | np.integer):
        raise DataRefused(f"pixel arrays must hold whole numbers 0..255, these are {array.dtype}")
    if array.size and (array.min() < 0 or array.max() > 255):
        raise DataRefused(f"pixel values must lie in 0..255, these span {array.min()}..{array.max()}")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4)):
        return np.ascontiguousarray(array.astype(np.uint8))
    raise DataRefused(f"pixel arrays must be [h, w], [h, w, 3] or [3, h, w], this one is {list(array.shape)}")
