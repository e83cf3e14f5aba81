"""What is measured: models with random weights, image and batch sizes, and the ratios that are aimed at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hf_dpvision import load_model
from hf_dpvision.trainable import TrainLayers, train_only


PLAIN_LAYERS = (nn.Linear, _ConvNd, nn.LayerNorm, nn.GroupNorm, nn.Embedding)


class Trained(Enum):
    """Which parameters are trained.

    BIAS and HEAD are compared with the non-private step that trains everything; LAYERS leaves out, in every column,
    the parameters that no plain layer owns (class token, positions, layer scales): of these Opacus has no rule, and
    with them it hands the whole model to functorch.
    """

    ALL = "all"
    BIAS = "bias"
    HEAD = "head"
    LAYERS = "layers"


Variants = tuple[tuple[str, int], ...]
TWO_PASSES: Variants = (("auto", 2),)
EVERY_RULE: Variants = (*TWO_PASSES, ("mixed", 1), ("ghost", 1), ("instantiate", 1))
# Gram matrices of up to 12,544 positions make "ghost" everywhere ten times slower than anything else.
ALL_BUT_GHOST: Variants = tuple(variant for variant in EVERY_RULE if variant[0] != "ghost")


@dataclass(frozen=True)
class Target:
    """Ratios to the non-private step that are not to be exceeded."""

    time: float
    memory: float


@dataclass(frozen=True)
class Case:
    """One model at one size.

    Args:
        title: as printed.
        model: a name of `BUILT_HERE` or of timm's registry.
        image_size: height and width in pixels.
        batch_size: examples in a step.
        trained: which parameters.
        target: of our one-pass step, if there is one.
        variants: norm rule and passes of our further sides.
        peers: measure Opacus too.
        largest_batch: take the peaks of larger batches too, and fit.
    """

    title: str
    model: str
    image_size: int
    batch_size: int
    trained: Trained = Trained.ALL
    target: Target | None = None
    variants: Variants = EVERY_RULE
    peers: bool = True
    largest_batch: bool = False


VIT = ("ViT-S/16", "vit_small_patch16_224", 224, 8)
CPU_SUITE = (
    Case("VGG-19 CIFAR", "vgg19_cifar", 32, 32, target=Target(1.10, 0.80), largest_batch=True),
    Case("ResNet-18 CIFAR GroupNorm", "resnet18_cifar", 32, 32, target=Target(1.12, 1.00)),
    Case("ResNet-18 GroupNorm", "resnet18", 224, 8, target=Target(1.12, 0.90), variants=ALL_BUT_GHOST),
    Case("ResNet-50 GroupNorm", "resnet50", 224, 4, target=Target(1.15, 1.00), variants=TWO_PASSES),
    Case(*VIT, target=Target(1.15, 1.05)),
    Case("BEiT-B/16", "beit_base_patch16_224", 224, 4, target=Target(1.12, 1.05), variants=TWO_PASSES),
    Case("Swin-T", "swin_tiny_patch4_window7_224", 224, 4, target=Target(1.15, 1.05), variants=TWO_PASSES),
    Case("ConvNeXt-atto", "convnext_atto", 224, 8, target=Target(1.08, 1.00), variants=TWO_PASSES),
    Case(*VIT, Trained.BIAS, Target(0.75, 0.60), variants=(), peers=False),
    Case(*VIT, Trained.HEAD, Target(0.40, 0.30), variants=(), peers=False),
    Case(*VIT, Trained.LAYERS, variants=()),
)
SMOKE_SUITE = (Case("tiny", "tiny", 8, 4, target=Target(100, 100), largest_batch=True),)


def build(case: Case, seed: int) -> nn.Module:
    """Return the case's model with random weights, everything trainable, in training mode without random drops.

    BatchNorm is replaced by GroupNorm, on every side. Normal noise of deviation 0.02 is added to all parameters, so
    that layers that start at zero (layer scales, relative positions) take part in the comparison of gradients.
    """
    torch.manual_seed(seed)
    if case.model in BUILT_HERE:
        model = BUILT_HERE[case.model]()
    else:
        name = f"timm/{case.model}"
        wrapper = load_model(name, pretrained=False, image_size=case.image_size, replace_batchnorm="group")
        model = wrapper.timm_model
    model.train()
    for module in model.modules():
        if isinstance(module, (DropPath, nn.Dropout)):
            module.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def freeze(model: nn.Module, trained: Trained) -> None:
    """Leave only the wanted parameters of a timm model trainable; the classifier counts as trained with BIAS."""
    if trained is Trained.LAYERS:
        for module in model.modules():
            if not isinstance(module, PLAIN_LAYERS):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
    elif trained is not Trained.ALL:
        train_only(load_model(model), TrainLayers(trained.value))


def random_batch(case: Case, n: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Return `n` random images `[n, 3, h, h]` and labels `[n]` below 10."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, case.image_size, case.image_size, generator=generator)
    labels = torch.randint(10, (n,), generator=generator)
    return {"x": images.to(device), "y": labels.to(device)}


def vgg19_cifar() -> nn.Module:
    """VGG-19 for 32 pixels as published work on CIFAR trains it: 16 convolutions and one linear layer.

    Simonyan and Zisserman 2015, arXiv:1409.1556, configuration E, with normalisation and without the two wide linear
    layers, which need 224 pixels. Not in place, since Opacus refuses in-place operations after a hooked layer.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, convolutions in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return load_model(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), replace_batchnorm="group")


def resnet18_cifar() -> nn.Module:
    """timm's ResNet-18 with the first layers for 32 pixels: a 3x3 convolution of stride 1, no pooling (He et al. 2016,
    arXiv:1512.03385, section 4.2)."""
    wrapper = load_model("timm/resnet18", pretrained=False, num_labels=10, replace_batchnorm="group")
    model = wrapper.timm_model
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def tiny() -> nn.Module:
    """Small enough for a test."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )


BUILT_HERE: dict[str, Callable[[], nn.Module]] = {
    "vgg19_cifar": vgg19_cifar,
    "resnet18_cifar": resnet18_cifar,
    "tiny": tiny,
}
