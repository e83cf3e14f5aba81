"""The models that must be covered: one small variant of each family, with everything that is special about it.

Small means few blocks, narrow layers and small images; the operations and the way in which parameters reach
them are those of the real models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import transformers
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.vgg import VGG
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dpvision import batchnorm


NUM_CLASSES = 5
EXAMPLES = 3


@dataclass(frozen=True)
class Case:
    """A model family; `build` returns a fresh small variant, `image_size` is in pixels.

    `repeat`: the reference has to run each example twice and halve, because torch's CPU kernels give wrong gradients
    for this model at batch size 1 (torch 2.15, confirmed with finite differences).
    """

    name: str
    build: Callable[[], nn.Module]
    image_size: int = 32
    repeat: bool = False


VIT = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
SWIN = dict(img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2))
CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
RESNET = dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=NUM_CLASSES)


def _timm(name: str, **arguments: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=NUM_CLASSES, drop_path_rate=0.0, **arguments)


def _frozen(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    with_activation = (timm.layers.BatchNormAct2d,)
    return lambda: batchnorm.replace_batchnorm(build(), batchnorm.freeze, with_activation=with_activation)


def _grouped(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    with_activation = (timm.layers.BatchNormAct2d,)
    return lambda: batchnorm.replace_batchnorm(build(), batchnorm.to_group_norm, with_activation=with_activation)


def _volo() -> nn.Module:
    return VOLO(
        layers=[1, 1],
        img_size=32,
        embed_dims=[12, 24],
        num_heads=[2, 2],
        num_classes=NUM_CLASSES,
        stem_hidden_dim=8,
        downsamples=(True, False),
        outlook_attention=(True, False),
    )


def _vgg() -> nn.Module:
    layout = [8, "M", 12, "M", 16, 16, "M", 16, 16, "M", 16, 16, "M"]  # VGG-11, narrow
    return VGG(layout, num_classes=NUM_CLASSES, mlp_ratio=0.004)


TIMM_CASES = [
    Case("beit", _timm("beit_base_patch16_224", **VIT)),
    Case(
        "beit_shared_table",
        _timm(
            "beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True, use_abs_pos_emb=True, **VIT
        ),
    ),
    Case("beitv2", _timm("beitv2_base_patch16_224", **VIT)),
    Case("deit_distilled", _timm("deit_tiny_distilled_patch16_224", **VIT)),
    Case("vit_registers_layer_scale", _timm("vit_small_patch14_reg4_dinov2", **VIT)),
    Case("swin", _timm("swin_tiny_patch4_window7_224", **SWIN)),
    Case("swinv2", _timm("swinv2_tiny_window8_256", **SWIN)),
    Case("convnext", _timm("convnext_atto", **CONVNEXT)),
    Case("convnextv2", _timm("convnextv2_atto", **CONVNEXT)),
    Case("eva02", _timm("eva02_tiny_patch14_224", **VIT)),
    Case("eva02_separate_qkv", _timm("eva02_base_patch14_224", **VIT)),
    Case("xcit", _frozen(_timm("xcit_nano_12_p8_224", **VIT)), repeat=True),
    Case(
        "maxvit",
        _frozen(_timm("maxvit_rmlp_pico_rw_256", img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=8)),
        image_size=64,
    ),
    Case("cait", _timm("cait_xxs24_224", **VIT)),
    Case(
        "mixer",
        lambda: MlpMixer(NUM_CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=16, mlp_ratio=(0.5, 2)),
    ),
    Case("resnet_group_norm", _grouped(lambda: ResNet(BasicBlock, **RESNET))),
    Case("resnet_frozen_batch_norm", _frozen(lambda: ResNet(BasicBlock, **RESNET))),
    Case(
        "resnetv2_bit",
        lambda: ResNetV2(
            [1, 1],
            channels=(128, 128),
            stem_chs=32,
            num_classes=NUM_CLASSES,
            stem_type="fixed",
            conv_layer=timm.layers.StdConv2d,
        ),
    ),
    Case("resnext", _frozen(lambda: ResNet(Bottleneck, cardinality=4, base_width=16, **RESNET))),
    Case("vgg", _vgg),
    Case("efficientnet", _frozen(_timm("test_efficientnet"))),
    Case("mobilevit", _frozen(lambda: timm.create_model("mobilevit_xxs", num_classes=NUM_CLASSES)), image_size=64),
    Case(
        "coatnet",
        _frozen(
            _timm(
                "coatnet_nano_rw_224", img_size=32, embed_dim=(8, 32, 32, 32), depths=(1, 1, 1, 1), stem_width=(8, 8)
            )
        ),
    ),
    Case("davit", _timm("davit_tiny", depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2))),
    Case("volo", _frozen(_volo)),
    Case("nfnet", _timm("test_nfnet")),
]


VIT_CONFIG = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=32,
    patch_size=8,
    num_labels=NUM_CLASSES,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def _beit(**arguments: object) -> Callable[[], nn.Module]:
    config = transformers.BeitConfig(drop_path_rate=0.0, **VIT_CONFIG, **arguments)
    return lambda: transformers.BeitForImageClassification(config)


def _swinv2_transformers() -> nn.Module:
    return transformers.Swinv2ForImageClassification(
        transformers.Swinv2Config(
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
            drop_path_rate=0.0,
            num_labels=NUM_CLASSES,
        )
    )


def _resnet_transformers() -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], num_labels=NUM_CLASSES, layer_type="bottleneck"
        )
    )


def _convnext_transformers() -> nn.Module:
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(
            hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], drop_path_rate=0.0, num_labels=NUM_CLASSES
        )
    )


TRANSFORMERS_CASES = [
    Case("transformers_beit_no_position", _beit(use_mask_token=True)),
    Case("transformers_beit_absolute", _beit(use_absolute_position_embeddings=True)),
    Case("transformers_beit_relative", _beit(use_relative_position_bias=True)),
    Case("transformers_beit_shared_relative", _beit(use_shared_relative_position_bias=True)),
    Case(
        "transformers_beit_all",
        _beit(
            use_absolute_position_embeddings=True,
            use_relative_position_bias=True,
            use_shared_relative_position_bias=True,
            use_mean_pooling=False,
        ),
    ),
    Case("transformers_vit", lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT_CONFIG))),
    Case("transformers_swinv2", _swinv2_transformers),
    Case("transformers_convnext", _convnext_transformers),
    Case("transformers_resnet_frozen_batch_norm", _frozen(_resnet_transformers)),
]

CASES = TIMM_CASES + TRANSFORMERS_CASES


def perturbed(model: nn.Module, dtype: torch.dtype, scale: float = 0.05) -> nn.Module:
    """`model` in training mode with all parameters trainable and none at its initial value, where zeros hide errors.

    Dropout is off: a loop over single examples would draw other masks.
    """
    model = model.to(dtype).train().requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def images(image_size: int, dtype: torch.dtype, n: int = EXAMPLES) -> dict[str, Tensor]:
    """A batch of `n` random images `[n, 3, image_size, image_size]` with labels `[n]`."""
    generator = torch.Generator().manual_seed(2)
    return {
        "pixel_values": torch.randn(n, 3, image_size, image_size, generator=generator).to(dtype),
        "labels": torch.arange(n) % NUM_CLASSES,
    }


def classification_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of each example, `[n]`; a model with several outputs is trained on their sum."""
    output = model(batch["pixel_values"])
    if isinstance(output, transformers.utils.ModelOutput):
        output = output.logits
    if isinstance(output, tuple):
        output = sum(part.flatten(1)[:, :NUM_CLASSES] for part in output)
    return F.cross_entropy(output, batch["labels"], reduction="none")
