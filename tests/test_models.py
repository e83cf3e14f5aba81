"""Models come in by many doors and leave by one: as float32 classifiers that can be saved and loaded again.

Long, because every door has its properties.
"""

from __future__ import annotations

import copy
import json
import logging
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import transformers
from cases import TIMM_CASES, perturbed
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_dpvision import load_model
from hf_dpvision.batchnorm import FrozenBatchNorm, freeze, group_count, replace_batchnorm, to_group_norm
from hf_dpvision.errors import ArgumentRefused, ModelRefused


NAMES = {0: "cat", 1: "dog", 2: "owl"}
VIT = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output = model.eval()(x)
    return getattr(output, "logits", output)


def pixels(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


def tiny_resnet(num_labels: int = 4) -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], num_labels=num_labels)
    )


def tiny_beit(num_labels: int = 4) -> nn.Module:
    return transformers.BeitForImageClassification(
        transformers.BeitConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=8,
            use_relative_position_bias=True,
            num_labels=num_labels,
        )
    )


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    """A folder as timm writes it today, whose model_args hold num_classes."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["num_classes"] == 4
    return tmp_path


def test_a_registry_name_gives_a_transformers_model_offline() -> None:
    model = load_model("timm/test_vit", id2label=NAMES, pretrained=False)
    assert isinstance(model, transformers.TimmWrapperForImageClassification)
    assert model.config.num_labels == 3
    assert model.config.id2label == NAMES
    assert model.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    assert not model.training
    assert logits(model, pixels(160)).shape == (2, 3)


def test_a_folder_of_timm_is_loaded_as_it_is(timm_folder: Path) -> None:
    model = load_model(timm_folder)
    raw = timm.create_model(f"local-dir:{timm_folder}", pretrained=True)
    x = pixels()
    torch.testing.assert_close(logits(model, x), logits(raw, x), rtol=0, atol=0)
    assert model.config.num_labels == 4


def test_a_folder_of_timm_gets_a_new_head(timm_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_dpvision.models"):
        model = load_model(str(timm_folder), id2label=NAMES)
    assert "head" in caplog.text and "random" in caplog.text
    assert model.config.id2label == NAMES
    saved = load_model(timm_folder).state_dict()
    for name, tensor in model.state_dict().items():
        if "head" not in name:
            assert torch.equal(tensor, saved[name])


def test_position_embeddings_follow_the_image_size(timm_folder: Path) -> None:
    model = load_model(timm_folder, image_size=64)
    assert logits(model, pixels(64)).shape == (2, 4)
    assert tuple(model.config.pretrained_cfg["input_size"]) == (3, 64, 64)


@pytest.mark.parametrize("num_labels", [None, 3])
def test_saving_and_loading_keeps_the_function(timm_folder: Path, tmp_path: Path, num_labels: int | None) -> None:
    model = load_model(timm_folder, num_labels=num_labels, image_size=64)
    model.save_pretrained(tmp_path / "saved")
    x = pixels(64)
    expected = logits(model, x)
    for again in (
        load_model(tmp_path / "saved"),
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved"),
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True),
    ):
        torch.testing.assert_close(logits(again, x), expected, rtol=0, atol=0)


def test_a_saved_folder_does_not_name_the_place_it_came_from(timm_folder: Path, tmp_path: Path) -> None:
    load_model(timm_folder).save_pretrained(tmp_path / "saved")
    assert str(timm_folder) not in (tmp_path / "saved" / "config.json").read_text()


def test_names_of_classes_survive(timm_folder: Path, tmp_path: Path) -> None:
    load_model(timm_folder, id2label=NAMES).save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved").config.id2label == NAMES


@pytest.mark.parametrize(
    "architecture",
    [
        "test_vit",
        "test_resnet",
        "test_efficientnet",
        "test_nfnet",
        "test_convnext",
        "test_byobnet",
        "test_mambaout",
        "mobilevit_xxs",
        "xcit_nano_12_p16_224",
        "efficientformer_l1",
        "edgenext_xx_small",
        "pit_ti_224",
    ],
)
def test_a_raw_timm_module_is_wrapped_and_stays_the_same_module(architecture: str) -> None:
    raw = timm.create_model(architecture, num_classes=3).eval()
    model = load_model(raw, id2label=NAMES)
    assert isinstance(model, transformers.TimmWrapperForImageClassification)
    assert model.timm_model is raw
    assert model.config.id2label == NAMES


def test_a_raw_timm_module_with_construction_arguments_can_be_saved(tmp_path: Path) -> None:
    raw = timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT)
    model = load_model(raw, num_labels=3)
    model.save_pretrained(tmp_path)
    x = pixels()
    torch.testing.assert_close(logits(load_model(tmp_path), x), logits(model, x), rtol=0, atol=0)


def test_a_timm_module_that_was_rebuilt_by_hand_is_refused() -> None:
    raw = timm.create_model("vit_tiny_patch16_224", **VIT)
    raw.blocks[0].mlp = nn.Identity()
    with pytest.raises(ModelRefused, match="could not be loaded again"):
        load_model(raw)


def test_any_other_module_is_returned_itself() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert load_model(module) is module
    with pytest.raises(ArgumentRefused, match="head"):
        load_model(module, num_labels=4)
    with pytest.raises(ArgumentRefused, match="image_size"):
        load_model(module, image_size=32)


def test_a_transformers_folder_keeps_its_weights_and_gets_a_new_head(tmp_path: Path) -> None:
    beit = tiny_beit().eval()
    beit.save_pretrained(tmp_path)
    x = pixels()
    torch.testing.assert_close(logits(load_model(tmp_path), x), logits(beit, x), rtol=0, atol=0)
    model = load_model(tmp_path, id2label=NAMES)
    assert model.config.id2label == NAMES
    saved = beit.state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(tensor, saved[name])


def test_an_image_size_that_would_reset_pretrained_tables_is_refused(tmp_path: Path) -> None:
    tiny_beit().save_pretrained(tmp_path)
    with pytest.raises(ModelRefused, match="relative_position_bias_table"):
        load_model(tmp_path, image_size=64)


def test_random_weights_are_random(tmp_path: Path) -> None:
    beit = tiny_beit()
    beit.save_pretrained(tmp_path)
    model = load_model(tmp_path, pretrained=False)
    assert not torch.equal(model.classifier.weight, beit.classifier.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_beit().to(dtype).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(tmp_path).parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load_model(tiny_beit().to(dtype)).parameters()} == {torch.float32}
    timm_model = timm.create_model("vit_tiny_patch16_224", **VIT).to(dtype)
    timm.models.save_for_hf(timm_model, tmp_path / "timm", safe_serialization=True)
    assert {parameter.dtype for parameter in load_model(tmp_path / "timm").parameters()} == {torch.float32}


def test_double_precision_modules_stay() -> None:
    assert load_model(nn.Linear(3, 2).double()).weight.dtype == torch.float64


def test_frozen_half_precision_weights_under_float32_adapters_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 3).to(torch.bfloat16).requires_grad_(False), nn.Linear(3, 2))
    assert load_model(model)[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm/vit_tinny_patch16_224", "timm/vit_tiny_patch16_224"),
        ("timm/vit_tiny_patch16_224.augreg_in22k", "timm/vit_tiny_patch16_224.augreg_in21k"),
        ("timm/nothing_like_this_exists_anywhere", "no architecture"),
        ("/nowhere/at/all", "no folder"),
        ("runs/nowhere/at/all", "no folder"),
        ("nobody/nothing", "network"),
        ("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224"),
        ("hf-hub:nobody/nothing", "network"),
        ("timm/vgg11", "pretrained=False"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(name: str, says: str) -> None:
    with pytest.raises(ModelRefused, match=says):
        load_model(name)


def test_a_folder_without_a_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelRefused, match="save_pretrained"):
        load_model(tmp_path)


def test_a_folder_with_broken_weights_is_explained(timm_folder: Path) -> None:
    (timm_folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelRefused, match="could not be loaded"):
        load_model(timm_folder)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_labels=0),
        dict(num_labels=-1),
        dict(num_labels=2, id2label=NAMES),
        dict(id2label={}),
        dict(id2label={1: "one", 2: "two"}),
        dict(replace_batchnorm="instance"),
    ],
    ids=str,
)
def test_arguments_that_contradict_one_another_are_refused(arguments: dict) -> None:
    with pytest.raises(ArgumentRefused):
        load_model("timm/test_vit", pretrained=False, **arguments)


# Batch normalisation


def batch_norm(kind: type = nn.BatchNorm2d, channels: int = 16, **options: object) -> nn.Module:
    layer = kind(channels, **options)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_is_what_the_layer_does_in_evaluation_mode(affine: bool) -> None:
    layer = batch_norm(affine=affine).eval()
    x = torch.randn(3, 16, 4, 4)
    expected = layer(x)
    frozen = replace_batchnorm(layer, freeze).train()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    torch.testing.assert_close(frozen(x), expected)
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, before[name])
    assert set(before) == set(layer.state_dict())


def test_frozen_weights_stay_trainable_and_are_the_same_parameters() -> None:
    layer = batch_norm()
    frozen = replace_batchnorm(layer, freeze)
    assert frozen.weight is layer.weight and frozen.bias is layer.bias
    frozen(torch.randn(3, 16, 4, 4)).sum().backward()
    assert layer.bias.grad is not None


@pytest.mark.parametrize("replacement", [freeze, to_group_norm])
def test_activations_that_a_layer_carries_are_kept(replacement: object) -> None:
    layer = batch_norm(timm.layers.BatchNormAct2d).eval()
    x = torch.randn(3, 16, 4, 4)
    new = replace_batchnorm(layer, replacement, with_activation=(timm.layers.BatchNormAct2d,))
    assert new(x).min() == 0  # ReLU
    if replacement is freeze:
        torch.testing.assert_close(new(x), layer(x))


@pytest.mark.parametrize("replacement", [freeze, to_group_norm])
@pytest.mark.parametrize("kind,shape", [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm3d, (2, 3, 2))])
def test_every_dimensionality_is_replaced(replacement: object, kind: type, shape: tuple) -> None:
    new = replace_batchnorm(nn.Sequential(batch_norm(kind)), replacement).train()
    x = torch.randn(3, 16, *shape)
    one = new(x[:1])
    torch.testing.assert_close(new(x)[:1], one)  # no example sees another one


def test_group_norm_starts_where_batch_norm_was() -> None:
    """On an image whose groups have the statistics of the training set, nothing changes."""
    layer = batch_norm().eval()
    noise = torch.randn(1, 16, 200, 200, dtype=torch.float64)
    noise = (noise - noise.mean((2, 3), keepdim=True)) / noise.std((2, 3), keepdim=True, unbiased=False)
    x = layer.running_mean.double().view(-1, 1, 1) + layer.running_var.double().sqrt().view(-1, 1, 1) * noise
    new = replace_batchnorm(layer, to_group_norm)
    torch.testing.assert_close(new.double()(x), layer.double()(x), rtol=1e-4, atol=1e-4)


def fitted(x: Tensor, y: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of a GroupNorm with which it is closest to `y`, by least squares for each channel."""
    z = nn.functional.group_norm(x, groups, eps=eps).double().transpose(0, 1).flatten(1)
    y = y.double().transpose(0, 1).flatten(1)
    weight = ((z - z.mean(1, True)) * (y - y.mean(1, True))).mean(1) / z.var(1, unbiased=False)
    return weight, y.mean(1) - weight * z.mean(1)


def test_no_other_parameters_of_group_norm_start_there() -> None:
    layer = batch_norm().eval()
    noise = torch.randn(1, 16, 200, 200, dtype=torch.float64)
    noise = (noise - noise.mean((2, 3), keepdim=True)) / noise.std((2, 3), keepdim=True, unbiased=False)
    x = layer.running_mean.double().view(-1, 1, 1) + layer.running_var.double().sqrt().view(-1, 1, 1) * noise
    expected = copy.deepcopy(layer).double()(x)
    new = replace_batchnorm(layer, to_group_norm)
    weight, bias = fitted(x, expected, new.num_groups, new.eps)
    torch.testing.assert_close(new.weight.double(), weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(new.bias.double(), bias, rtol=1e-3, atol=1e-3)


def test_group_norm_starts_almost_as_close_as_parameters_fitted_to_the_data() -> None:
    """On a trained network, layer by layer, and much closer than with the parameters copied."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    widths = (1, 16, 24, 32)
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in pairwise(widths)
    ]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for chosen in torch.randperm(1400).repeat(6).split(100):
        nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    assert (net(images[1400:]).argmax(1) == labels[1400:]).float().mean() > 0.8
    x = images[1400:]
    for block in blocks:
        inputs = block[0](x)
        expected = block[1](inputs)
        new = to_group_norm(block[1], False)
        groups, eps = new.num_groups, new.eps

        def error(weight: Tensor, bias: Tensor, g=groups, e=eps, i=inputs, y=expected) -> float:
            return float((nn.functional.group_norm(i, g, weight.float(), bias.float(), e) - y).detach().norm())

        started, copied = error(new.weight, new.bias), error(block[1].weight, block[1].bias)
        least = error(*fitted(inputs, expected, groups, eps))
        assert least * (1 - 1e-6) <= started < 1.25 * least
        assert started < 0.75 * copied
        x = block(x)


def test_group_norm_without_statistics_has_the_same_parameters() -> None:
    layer = nn.BatchNorm2d(16, track_running_stats=False)
    new = replace_batchnorm(layer, to_group_norm)
    assert new.weight is layer.weight and new.bias is layer.bias


def test_replaced_parameters_are_as_trainable_as_before() -> None:
    layer = batch_norm()
    layer.bias.requires_grad_(False)
    new = replace_batchnorm(layer, to_group_norm)
    assert new.weight.requires_grad and not new.bias.requires_grad


def test_groups_are_a_sensible_number() -> None:
    counts = {channels: group_count(channels) for channels in (1, 3, 7, 8, 16, 24, 40, 64, 100, 256, 512, 1280, 2048)}
    assert counts == {
        1: 1, 3: 1, 7: 1, 8: 1, 16: 2, 24: 3, 40: 5, 64: 8, 100: 10, 256: 32, 512: 32, 1280: 32, 2048: 32
    }  # fmt: skip


def test_a_layer_with_two_names_stays_one_layer() -> None:
    layer = batch_norm()
    model = replace_batchnorm(nn.ModuleDict({"a": nn.Sequential(layer), "b": layer}), freeze)
    assert model["a"][0] is model["b"]
    assert isinstance(model["b"], FrozenBatchNorm)


def test_a_layer_with_other_arithmetic_is_refused_by_name_and_nothing_is_replaced() -> None:
    class Strange(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(batch_norm(), Strange(16))
    with pytest.raises(ModelRefused, match="'1'.*Strange"):
        replace_batchnorm(model, freeze)
    assert isinstance(model[0], nn.BatchNorm2d)


def test_a_layer_without_statistics_cannot_be_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm2d(16, track_running_stats=False))
    with pytest.raises(ModelRefused, match="running statistics"):
        replace_batchnorm(model, freeze)
    assert isinstance(replace_batchnorm(model, to_group_norm)[0], nn.GroupNorm)


@pytest.mark.parametrize("how", ["group", "freeze"])
@pytest.mark.parametrize("origin", ["timm", "transformers"])
def test_replaced_layers_survive_saving(how: str, origin: str, tmp_path: Path) -> None:
    source = timm.create_model("test_efficientnet", num_classes=4) if origin == "timm" else tiny_resnet()
    model = load_model(perturbed(source, torch.float32), replace_batchnorm=how)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    model.save_pretrained(tmp_path)
    x = pixels()
    again = load_model(tmp_path)
    torch.testing.assert_close(logits(again, x), logits(model, x), rtol=0, atol=0)
    assert load_model(tmp_path, replace_batchnorm=how).config.num_labels == 4
    assert load_model(tmp_path, num_labels=3).config.num_labels == 3
    other = {"group": "freeze", "freeze": "group"}[how]
    with pytest.raises(ArgumentRefused, match="saved with BatchNorm replaced"):
        load_model(tmp_path, replace_batchnorm=other)


def test_no_model_of_the_table_keeps_a_layer_that_mixes_examples() -> None:
    for case in TIMM_CASES:
        model = copy.deepcopy(case.build())
        for name, module in model.named_modules():
            assert not isinstance(module, nn.modules.batchnorm._BatchNorm), f"{case.name}: {name}"
