"""A classifier taken apart at its last linear layer, and put together again.

What the last layer receives are the features; a linear head that was trained on them alone becomes the last layer, so
that the result is the ordinary model with another head.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import ModelRefused
from .trainable import head_parameters


# of the configuration: how classes, files and releases are called changes no feature
_NAMES_ONLY = ("id2label", "label2id", "_name_or_path", "transformers_version", "architectures")


def last_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the classifier's last linear layer, the one with an output for each class.

    Raises:
        ModelRefused: there is none, or more than one (distilled models have two).
    """
    head = set(head_parameters(model))
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and f"{name}.weight" in head
    ]
    if len(found) != 1:
        raise ModelRefused(
            f"{type(model).__name__} has {len(found)} linear layers in its classifier with "
            f"{model.config.num_labels} outputs, where one is needed to tell features from head. Choose a model that "
            "ends in a single linear layer."
        )
    return found[0]


class Backbone:
    """The frozen model without its last layer: pixels `[b, c, h, w]` in, features `[b, d]` out.

    Guarantee: a row of features depends on its own picture alone (evaluation mode, no gradients), and the last layer
    applied to the features gives the model's logits.

    Args:
        model: put into evaluation mode; nothing else of it changes, and it is not to be changed while this is used.
        device: where it runs; the model is moved there.
        half: compute in bfloat16 where autocast finds it safe; several times faster where the processor can do it.

    Raises:
        ModelRefused: as `last_layer`.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | str = "cpu", half: bool = False) -> None:
        self._layer = last_layer(model)
        self._model = model.eval().to(device)
        self._device, self._half = torch.device(device), half
        self.fingerprint = _fingerprint(model, self._layer, half)

    def __call__(self, pixels: Tensor) -> Tensor:
        # Channels last: convolutions of small kernels take up to half the time, and a transformer does not mind.
        pixels = pixels.to(self._device, memory_format=torch.channels_last)
        received: list[Tensor] = []
        handle = self._layer.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
        try:
            with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
                self._model(pixel_values=pixels)
        finally:
            handle.remove()
        return received[0].float()


def set_head(model: PreTrainedModel, weight: Tensor) -> None:
    """Make `weight` `[k, d]` the last layer, with bias zero.

    A head that was fitted to features of unit length finds the same class on features of any length, for without a
    bias the length multiplies all logits alike.

    Raises:
        ModelRefused: as `last_layer`, or the shapes differ.
    """
    layer = last_layer(model)
    if layer.weight.shape != weight.shape:
        raise ModelRefused(
            f"a head of shape {list(weight.shape)} does not fit {type(model).__name__}, whose last layer has "
            f"{list(layer.weight.shape)}. Load the model with num_labels={weight.shape[0]}."
        )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.zero_()


def _fingerprint(model: PreTrainedModel, layer: nn.Linear, half: bool) -> str:
    """Return a digest of everything that the features depend on; the last layer, often random, is left out."""
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _NAMES_ONLY}
    digest = hashlib.sha256(f"{model}\n{half}\n{json.dumps(settings, sort_keys=True, default=str)}".encode())
    left_out = {id(parameter) for parameter in layer.parameters()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in left_out:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
