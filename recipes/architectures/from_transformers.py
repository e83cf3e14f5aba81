"""Every image classifier that transformers registers, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from .reduction import Reduction, reduced


PREFIX = "transformers/"
IMAGE_SIZES = (64, 56, 96, 128, 224)
TEXT = 8  # tokens, where a model reads text beside the image
# Beside what the names of the arguments tell: sizes that only these models have.
OWN_ARGUMENTS: dict[str, dict[str, Any]] = {
    "bit": {"num_groups": 4},
    "cvt": {"depth": [1, 2, 3]},
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "imagegpt": {"n_positions": 64, "vocab_size": 33},
    "perceiver": {"num_latents": 8, "d_latents": 64, "num_self_attention_heads": 2, "num_cross_attention_heads": 1},
    "timm_wrapper": {"architecture": "test_vit", "do_pooling": True},
    "siglip2": {"vision_config": {"num_patches": 16}},
    "shieldgemma2": {
        "text_config": {
            "vocab_size": 64, "head_dim": 16, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7,
        "yes_token_index": 1, "no_token_index": 2,
    },
}  # fmt: skip


def classes() -> dict[str, str]:
    """`transformers/<class>` -> model type, for everything that AutoModelForImageClassification may give."""
    found = {}
    for model_type, registered in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
        for name in (registered,) if isinstance(registered, str) else registered:
            found[PREFIX + name] = model_type
    return found


def build(name: str, reduction: Reduction, image_size: int, num_classes: int) -> nn.Module:
    """The architecture with random weights."""
    model_type = classes()[name]
    cls = getattr(transformers, name.removeprefix(PREFIX))
    return cls(_config(model_type, reduction, image_size, num_classes))


def _config(model_type: str, reduction: Reduction, image_size: int, num_classes: int) -> Any:
    kind = CONFIG_MAPPING[model_type]
    own = OWN_ARGUMENTS.get(model_type, {})
    if model_type == "timm_wrapper":
        return kind(num_labels=num_classes, **own)
    default = kind()
    arguments: dict[str, Any] = {"num_labels": num_classes, **_small(default, reduction, image_size)}
    for part in default.sub_configs:
        content = getattr(default, part)
        arguments[part] = content.to_dict() | _small(content, reduction, image_size) | own.get(part, {})
    return kind(**arguments | {key: value for key, value in own.items() if key not in default.sub_configs})


def _small(config: Any, reduction: Reduction, image_size: int) -> dict[str, Any]:
    """Arguments that make a configuration smaller; only those it has."""
    content = {key: value for key, value in config.to_dict().items() if not isinstance(value, dict)}
    small = {key: value for key, value in reduced(content, reduction).items() if value != content[key]}
    if "image_size" in content:
        sides = content["image_size"]
        small["image_size"] = [image_size] * len(sides) if isinstance(sides, list) else image_size
    return small


def inputs(name: str, image_size: int, n: int) -> Mapping[str, Tensor]:
    """Random inputs of `n` examples: images, or what else the model reads."""
    special: dict[str, Callable[[int, int], Mapping[str, Tensor]]] = {
        "ImageGPTForImageClassification": _colours,
        "Siglip2ForImageClassification": _patches,
        "ShieldGemma2ForImageClassification": _image_and_text,
    }
    return special.get(name.removeprefix(PREFIX), _images)(image_size, n)


def _images(image_size: int, n: int) -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, image_size, image_size)}


def _colours(image_size: int, n: int) -> Mapping[str, Tensor]:
    return {"input_ids": torch.randint(32, (n, 64))}


def _patches(image_size: int, n: int) -> Mapping[str, Tensor]:
    shapes = torch.tensor([[4, 4], [2, 8], [3, 4]])[:n]  # images of several shapes; the last is padded
    return {
        "pixel_values": torch.randn(n, 16, 3 * 16 * 16),
        "pixel_attention_mask": (torch.arange(16) < shapes.prod(1, keepdim=True)).long(),
        "spatial_shapes": shapes,
    }


def _image_and_text(image_size: int, n: int) -> Mapping[str, Tensor]:
    text = torch.randint(8, 64, (n, TEXT))
    ids = torch.cat([torch.tensor([[6, *[5] * 4, 7]]).expand(n, -1), text], dim=1)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": (ids == 5).long(),
        **_images(image_size, n),
    }  # fmt: skip
