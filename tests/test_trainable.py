from __future__ import annotations

import pytest
import timm
import torch
from cases import CASES, classification_loss, images, perturbed
from reference import clip_and_sum, mismatch, per_example_gradients
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_dpvision import clipped_gradient, clipping, load_model
from hf_dpvision.blocks import find_blocks
from hf_dpvision.errors import ArgumentRefused, ModelRefused
from hf_dpvision.trainable import (
    LastBlocks,
    TrainLayers,
    chosen_layers,
    count_parameters,
    head_parameters,
    train_only,
    zero_head,
)


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


BUILDS = {case.name: case.build for case in CASES}
FIRST_AND_LAST = {
    "beit": ("blocks.0", "blocks.1", 2),
    "swin": ("layers.0.blocks.0", "layers.1.blocks.1", 4),
    "convnext": ("stages.0.blocks.0", "stages.3.blocks.0", 4),
    "resnet_group_norm": ("layer1.0", "layer4.0", 4),
    "efficientnet": ("blocks.0.0", "blocks.4.0", 5),
    "mobilevit": ("stages.0.0", "stages.4.1", 10),
    "cait": ("blocks.0", "blocks_token_only.1", 4),
    "transformers_vit": ("vit.layers.0", "vit.layers.1", 2),
    "transformers_beit_relative": ("beit.layers.0", "beit.layers.1", 2),
    "transformers_swinv2": ("swinv2.encoder.layers.0.blocks.0", "swinv2.encoder.layers.1.blocks.1", 4),
    "transformers_convnext": ("convnext.encoder.stages.0.layers.0", "convnext.encoder.stages.3.layers.0", 4),
    "transformers_resnet_frozen_batch_norm": (
        "resnet.encoder.stages.0.layers.0",
        "resnet.encoder.stages.1.layers.0",
        2,
    ),
    "vgg": (None, None, 0),
}


@pytest.mark.parametrize("name", FIRST_AND_LAST)
def test_blocks_are_found_by_how_a_model_is_built(name):
    blocks = [block.name for block in find_blocks(BUILDS[name]())]
    first, last, count = FIRST_AND_LAST[name]
    assert len(blocks) == count and blocks[:1] == [first] * bool(count) and blocks[-1:] == [last] * bool(count)


def test_the_last_blocks_come_with_what_stands_behind_them():
    model = BUILDS["transformers_convnext"]()
    trained = train_only(model, LastBlocks(2))
    assert trained[0] == "convnext.encoder.stages.2.layers.0.layer_scale_parameter"
    assert {name.rpartition(".")[0] for name in trained[-4:]} == {"convnext.layernorm", "classifier"}
    assert any("stages.3.downsampling_layer" in name for name in trained)  # between the two
    assert not any("stages.2.downsampling_layer" in name or "stages.1" in name for name in trained)


@pytest.mark.parametrize("name", ["vgg", "volo", "beit"])
def test_blocks_that_cannot_be_told_apart_or_are_too_few_are_refused(name):
    words = {"vgg": "0 blocks of VGG", "volo": "'network' has single modules", "beit": "2 blocks .* from 1 to 2"}
    with pytest.raises(ModelRefused, match=words[name]):
        train_only(BUILDS[name](), LastBlocks(3))


def test_choices_have_names():
    assert chosen_layers("last-12") == LastBlocks(12) and chosen_layers("norm") is TrainLayers.NORM
    assert LastBlocks(12).value == "last-12"
    for name in ("last", "last-", "last-two", "heads"):
        with pytest.raises(ArgumentRefused, match="'last-2'"):
            chosen_layers(name)


CHOICES = [TrainLayers.HEAD, TrainLayers.BIAS, TrainLayers.NORM, LastBlocks(1)]
EXACT = ["transformers_vit", "beit", "transformers_swinv2", "transformers_resnet_frozen_batch_norm", "convnext"]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("layers", CHOICES, ids=lambda layers: layers.value)
def test_every_choice_is_clipped_exactly(name, layers):
    model = perturbed(load_model(BUILDS[name]()), torch.float64)
    trained = train_only(model, layers)
    batch = images(32, torch.float64)
    truth = clip_and_sum(per_example_gradients(model, classification_loss, batch), clipping.Flat(1.0))
    assert set(truth.gradients) == set(trained)
    for rule, passes in (("auto", 1), ("ghost", 2)):
        found = clipped_gradient(
            model, classification_loss, batch, clipping=clipping.Flat(1.0), norm_rule=rule, backward_passes=passes
        )
        assert not mismatch(found.norms, found.gradients, truth, tolerance=1e-10, own=1e-7)


def deep_vit(depth: int) -> nn.Module:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=depth, num_labels=3, **sizes))


def cost(model: nn.Module, train: bool) -> tuple[int, int]:
    """Floating point operations of a step, or of the forward pass alone; and bytes saved for the backward pass."""
    batch, saved = images(16, torch.float32), []
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        saved.append(0 if tensor.untyped_storage().data_ptr() in weights else tensor.nbytes)
        return tensor

    kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, kept:
        if train:
            clipped_gradient(
                model, classification_loss, batch, clipping=clipping.Flat(1.0), norm_rule="instantiate",
                memory_bound=100,
            )  # fmt: skip
        else:
            with torch.no_grad():
                classification_loss(model, batch)
    return counter.get_total_flops(), sum(saved)


def test_frozen_blocks_before_the_last_ones_cost_their_forward_pass_and_nothing_else():
    shallow, deep = deep_vit(2), deep_vit(5)
    forward = cost(deep, train=False)[0] - cost(shallow, train=False)[0]
    assert forward > 0
    whole = [cost(model, train=True) for model in (shallow, deep)]
    assert whole[1][0] - whole[0][0] > 2 * forward and whole[1][1] > 2 * whole[0][1]
    for model in (shallow, deep):
        train_only(model, LastBlocks(1))
    (few, saved), (many, as_many) = (cost(model, train=True) for model in (shallow, deep))
    assert many - few == forward  # nothing of three more blocks but their forward pass
    assert as_many == saved > 0
