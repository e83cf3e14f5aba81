from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from transformers import BeitConfig, BeitForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_dpvision import load_model
from hf_dpvision.errors import ModelRefused
from hf_dpvision.trainable import TrainLayers, count_parameters, head_parameters, train_only, zero_head


def _beit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BeitForImageClassification(BeitConfig(image_size=16, patch_size=8, num_labels=3, **sizes))


def _timm_beit() -> nn.Module:
    module = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    return load_model(module)


def _resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    )


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (_beit, ["classifier.weight", "classifier.bias"]),
        (_timm_beit, ["timm_model.head.weight", "timm_model.head.bias"]),
        (_resnet, ["classifier.1.weight", "classifier.1.bias"]),
    ],
)
def test_the_head_is_found(build, expected):
    model = build()
    assert head_parameters(model) == expected
    assert train_only(model, TrainLayers.HEAD) == expected


def test_biases_include_those_that_are_bare_parameters():
    trained = train_only(_timm_beit(), TrainLayers.BIAS)
    assert {"timm_model.blocks.0.attn.q_bias", "timm_model.blocks.0.norm1.bias"} <= set(trained)
    assert [name for name in trained if name.endswith("weight")] == ["timm_model.head.weight"]


def test_norm_takes_scales_and_shifts_and_the_head():
    trained = train_only(_beit(), TrainLayers.NORM)
    assert "beit.layers.0.layernorm_before.weight" in trained and "classifier.weight" in trained
    assert not [name for name in trained if "dense" in name]


def test_all_trains_everything_but_what_was_frozen():
    model = _beit()
    model.beit.embeddings.cls_token.requires_grad_(False)
    everything = {name for name, _ in model.named_parameters()}
    assert everything - set(train_only(model, TrainLayers.ALL)) == {"beit.embeddings.cls_token"}


def test_a_zero_head_makes_every_class_equally_likely():
    model = _beit().eval()
    zero_head(model)
    assert torch.equal(model(torch.randn(2, 3, 16, 16)).logits, torch.zeros(2, 3))


def test_a_model_whose_head_is_unknown_is_refused():
    with pytest.raises(ModelRefused, match="classifier of Sequential"):
        train_only(nn.Sequential(nn.Linear(2, 2)), TrainLayers.HEAD)


def test_parameters_are_counted_by_number():
    model = _beit()
    train_only(model, TrainLayers.HEAD)
    assert count_parameters(model) == (16 * 3 + 3, sum(parameter.numel() for parameter in model.parameters()))
