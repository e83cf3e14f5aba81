"""LoRA through PEFT: low-rank adapters are trained instead of the weights (Hu et al. 2021, arXiv:2106.09685).

The weights stay frozen, so that no gradient of theirs is computed; per-example gradients are those of the two small
factors of each adapter, by the rules of the operations that they are made of. This is the only file that imports PEFT.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import ArgumentRefused, ModelRefused
from .trainable import head_parameters


@dataclass(frozen=True)
class Lora:
    """The update of a weight `W [p, d]` is `alpha / rank * B A` with trained `B [p, rank]` and `A [rank, d]`.

    Attributes:
        rank: of the update.
        alpha: scales it; by default `2 * rank`.
        targets: names of the layers that get an adapter, or their endings, such as `("qkv", "fc1")`. By default every
            linear layer but the head, or, in a model without any, every convolution that has no groups.

    Raises:
        ArgumentRefused: rank or alpha is not positive.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.chosen_alpha > 0:
            raise ArgumentRefused(
                f"lora_rank={self.rank!r} and lora_alpha={self.alpha!r}: both are positive, or there is nothing to "
                "train. Ranks from 4 to 32 are usual, and alpha twice the rank."
            )

    @property
    def chosen_alpha(self) -> float:
        """alpha, also where it was left out."""
        return 2 * self.rank if self.alpha is None else self.alpha


def with_adapters(model: PreTrainedModel, lora: Lora, pixels: Tensor) -> nn.Module:
    """Return a PEFT model around `model`: its weights are frozen, adapters and head are trained.

    Args:
        model: as returned by `load_model`; it gets the adapters.
        lora: the adapters.
        pixels: any picture of the size that the model takes, `[1, c, h, w]`, to see which layers run. A weight that is
            passed to an operation by hand, as that of timm's BEiT `qkv`, would leave its adapter out.

    Raises:
        ArgumentRefused: PEFT is not installed, or a target names no layer that runs.
        ModelRefused: the head cannot be told apart or has bare parameters, or nothing can get an adapter.
    """
    if importlib.util.find_spec("peft") is None:
        raise ArgumentRefused("train_layers='lora' needs PEFT. Install it: pip install 'hf_dpvision[peft]'.")
    from peft import LoraConfig, get_peft_model

    alpha: Any = lora.chosen_alpha  # PEFT declares an int, and only divides it by the rank
    head = _head_modules(model)
    targets = _targets(model, lora, head, _layers_that_run(model, pixels))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=targets,
        modules_to_save=head,
    )
    return get_peft_model(model, config)


def merged(model: nn.Module) -> nn.Module:
    """Return the ordinary model in which the adapters of a PEFT model have become part of the weights, all frozen.

    The PEFT model is taken apart and not to be used any more. What is returned is a function of the trained adapters
    and of the pretrained weights alone, so that a guarantee for those holds for it.
    """
    adapted: Any = model  # a PEFT model hands this on to its tuner
    return adapted.merge_and_unload(safe_merge=True).requires_grad_(False)


def _head_modules(model: PreTrainedModel) -> list[str]:
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in head_parameters(model)))
    if "" in owners:
        raise ModelRefused(
            f"The head of {type(model).__name__} has parameters of its own beside layers, which PEFT cannot train "
            "with the adapters. Choose another train_layers."
        )
    return owners


def _layers_that_run(model: PreTrainedModel, pixels: Tensor) -> dict[str, nn.Module]:
    """Linear and convolutional layers whose forward is called, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    ran: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: ran.add(name))
        for name, layer in layers.items()
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=pixels.to(model.device, model.dtype))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: layer for name, layer in layers.items() if name in ran}


def _targets(model: PreTrainedModel, lora: Lora, head: Sequence[str], layers: dict[str, nn.Module]) -> list[str]:
    body = {name: m for name, m in layers.items() if not any(f"{name}.".startswith(f"{part}.") for part in head)}
    if lora.targets is not None:
        wanted = {target: [name for name in body if f".{name}".endswith(f".{target}")] for target in lora.targets}
        if absent := [target for target, names in wanted.items() if not names]:
            raise ArgumentRefused(
                f"lora_targets {absent}: {type(model).__name__} has no linear or convolutional layer of that name "
                "outside of its head, or never runs it (timm's BEiT and Swin-v2 pass the weight of qkv to an "
                f"operation by hand), so that its adapter would be left out. Layers that run: {sorted(body)[:8]}."
            )
        return sorted({name for names in wanted.values() for name in names})
    found = [name for name, module in body.items() if isinstance(module, nn.Linear)]
    found = found or [name for name, module in body.items() if isinstance(module, nn.Conv2d) and module.groups == 1]
    if not found:
        raise ModelRefused(
            f"{type(model).__name__} has neither linear layers nor convolutions without groups outside of its head, "
            "so that there is nothing to adapt. Choose another train_layers."
        )
    return found
