"""What the model itself says about its input, read from timm's `pretrained_cfg` or the image processor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel, TimmWrapperConfig

from ..errors import DataRefused
from .transforms import Preprocessing, preprocessing_from_processor, preprocessing_from_timm


@dataclass(frozen=True)
class ModelInput:
    """How pictures are prepared for one model, and the processor to save beside it (None for timm models, which
    keep these settings in their config)."""

    preprocessing: Preprocessing
    processor: BaseImageProcessor | None


def model_input(
    model: PreTrainedModel,
    processor_name: str | None = None,
    *,
    image_size: int | None = None,
    crop_pct: float | None = None,
) -> ModelInput:
    """Find the model's preprocessing; `image_size` (pixels) and `crop_pct` (0, 1] replace its own values.

    What is replaced is also written where the saved model keeps it (the processor, or timm's `pretrained_cfg` in
    `model.config`), so that the released model is used the way it was trained.

    Args:
        processor_name: Hub id or folder of the image processor; needed for models that are not timm's.

    Raises:
        DataRefused: there is no image processor, its settings cannot be followed, or the model does not take pictures
            of the resulting size.
    """
    wanted = _described(model, processor_name, image_size, crop_pct)
    _refuse_size(model, wanted.preprocessing)
    return wanted


def _described(
    model: PreTrainedModel, processor_name: str | None, image_size: int | None, crop_pct: float | None
) -> ModelInput:
    if isinstance(model.config, TimmWrapperConfig):
        described = model.config.pretrained_cfg
        wanted = _replaced(preprocessing_from_timm(described), image_size, crop_pct)
        height, width = wanted.size
        described["input_size"] = (len(wanted.mean), height, width)
        described["crop_pct"] = crop_pct or described.get("crop_pct")
        return ModelInput(wanted, None)
    try:
        processor = AutoImageProcessor.from_pretrained(processor_name)
    except (OSError, ValueError, TypeError) as error:
        raise DataRefused(
            f"no image processor for {processor_name!r} ({type(error).__name__}: {error}): give "
            "image_processor_name, the Hub id or folder that holds preprocessor_config.json."
        ) from error
    settings = processor.to_dict()
    wanted = _replaced(preprocessing_from_processor(settings), image_size, crop_pct)
    if image_size is None and crop_pct is None:
        return ModelInput(wanted, processor)
    return ModelInput(wanted, type(processor).from_dict(settings | _sizes(settings, wanted)))


def _refuse_size(model: PreTrainedModel, wanted: Preprocessing) -> None:
    """Try one black picture: the processor beside a model may be for another size than the model."""
    height, width = wanted.size
    training = model.training
    black = torch.zeros(1, len(wanted.mean), height, width, device=model.device, dtype=model.dtype)
    try:
        with torch.no_grad():  # not inference_mode: models cache index tensors that training uses later
            model.eval()(pixel_values=black)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise DataRefused(
            f"{type(model).__name__} does not take pictures of {height} x {width} pixels with {len(wanted.mean)} "
            f"channels ({error}): set image_size to the model's own size."
        ) from error
    finally:
        model.train(training)


def _replaced(own: Preprocessing, image_size: int | None, crop_pct: float | None) -> Preprocessing:
    wanted = own if image_size is None else own.resized(image_size)
    return wanted if crop_pct is None else wanted.cropped(crop_pct)


def _sizes(settings: dict[str, object], wanted: Preprocessing) -> dict[str, object]:
    """Write the sizes of `wanted` in the words of an image processor."""
    height, width = wanted.size
    if "crop_pct" in settings and isinstance(wanted.resize, int):  # ConvNeXt: derives its crop from this fraction
        return {"size": {"shortest_edge": height}, "crop_pct": height / wanted.resize}
    scaled = wanted.resize
    size = {"shortest_edge": scaled} if isinstance(scaled, int) else {"height": scaled[0], "width": scaled[1]}
    whole = scaled == wanted.size
    return {
        "size": {"height": height, "width": width} if whole else size,
        "do_center_crop": not whole,
        "crop_size": {"height": height, "width": width},
    }
