"""LoRA through PEFT: exact per-example gradients of the adapters, none of frozen weights, and a release that loads."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from cases import CASES, classification_loss, images, perturbed
from reference import clip_and_sum, mismatch, per_example_gradients
from test_trainable import cost, deep_vit
from torch import nn
from trainer_cases import Images, tiny_vit, trainer
from transformers import AutoModelForImageClassification

from hf_dpvision import capture, clipped_gradient, clipping, load_model
from hf_dpvision.errors import ArgumentRefused, ModelRefused
from hf_dpvision.lora import Lora, with_adapters
from hf_dpvision.rules import rule_for
from hf_dpvision.verify.schema import read_statement


pytest.importorskip("peft")

BUILDS = {case.name: case.build for case in CASES}
PICTURE = torch.zeros(1, 3, 32, 32)


def adapted(name: str, lora: Lora | None = None) -> nn.Module:
    """A small model with adapters, in float64, none of them at zero."""
    model = load_model(BUILDS[name]()).double()
    model = with_adapters(model, lora or Lora(rank=2), PICTURE)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    perturbed(model, torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


MODELS = ["transformers_vit", "beit", "swin", "transformers_convnext", "transformers_resnet_frozen_batch_norm"]


@pytest.mark.parametrize("name", MODELS)
def test_adapters_and_head_are_clipped_exactly_and_nothing_else_is_trained(name):
    model, batch = adapted(name), images(32, torch.float64)
    names = trained(model)
    assert all("lora_" in name or ".modules_to_save." in name for name in names)
    truth = clip_and_sum(per_example_gradients(model, classification_loss, batch), clipping.Flat(1.0))
    assert all(gradient.abs().sum() > 0 for gradient in truth.gradients.values())  # no adapter is left out
    for rule, passes in (("auto", 1), ("ghost", 1), ("mixed", 2)):
        found = clipped_gradient(
            model, classification_loss, batch, clipping=clipping.Flat(1.0), norm_rule=rule, backward_passes=passes
        )
        assert not mismatch(found.norms, found.gradients, truth, tolerance=1e-10, own=1e-7)


def test_by_default_every_linear_layer_that_runs_gets_an_adapter():
    def layers(name: str) -> set[str]:
        names = (one.split(".lora_")[0] for one in trained(adapted(name)) if ".lora_" in one)
        return {".".join(one.split(".")[-2:]) for one in names}

    assert layers("transformers_vit") == {
        "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2",
    }  # fmt: skip
    assert layers("beit") == {"attn.proj", "mlp.fc1", "mlp.fc2"}  # the weight of qkv is passed on by hand
    assert all("convolution" in name for name in layers("transformers_resnet_frozen_batch_norm"))


def test_targets_can_be_named_and_those_that_never_run_are_refused():
    names = trained(adapted("transformers_vit", Lora(rank=2, targets=("q_proj", "v_proj"))))
    assert len(names) == 2 * 2 * 2 + 2
    for targets in (("attn.qkv",), ("proj", "no_such_layer")):
        with pytest.raises(ArgumentRefused, match=f"{targets[-1]}.* never runs it"):
            adapted("beit", Lora(targets=targets))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}):
        with pytest.raises(ArgumentRefused, match="lora_rank"):
            Lora(**wrong)


def test_a_model_whose_head_is_unknown_is_refused():
    with pytest.raises(ModelRefused, match="classifier of"):
        with_adapters(nn.Sequential(nn.Linear(2, 2)), Lora(), PICTURE)


def test_no_gradient_of_a_frozen_weight_is_computed():
    """Counted: a step costs one forward pass, one backward pass to activations, and what the small factors need."""
    depth, rank = 4, 1
    plain = deep_vit(depth)
    forward, _ = cost(plain, train=False)
    full, saved_in_full = cost(plain, train=True)
    model = with_adapters(deep_vit(depth), Lora(rank), torch.zeros(1, 3, 16, 16)).train()
    with_lora, saved = cost(model, train=True)
    adapters, _ = cost(model, train=False)
    # three products with the small factors: forward, to the activations, and to the factors themselves
    assert with_lora <= 2 * forward + 3 * (adapters - forward)
    assert full > 2.8 * forward and saved < saved_in_full


def test_only_uses_of_adapters_and_head_are_recorded():
    model, batch = adapted("transformers_vit"), images(32, torch.float64)
    with capture.capture(model, batch, 3, rule_for) as forward:
        classification_loss(model, batch)
    used = {name for slot in forward.uses.slots for name in slot.theta.sources}
    assert used == set(trained(model)) and all(slot.operation == "linear" for slot in forward.uses.slots)


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(pixel_values=Images(4).pixels).logits


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_what_is_released_is_an_ordinary_model_with_the_adapters_in_its_weights(tmp_path, kind):
    def build() -> nn.Module:
        torch.manual_seed(0)
        if kind == "transformers":
            return tiny_vit()
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        return load_model(timm.create_model("deit_tiny_patch16_224", num_classes=3, **sizes))

    model = with_adapters(build(), Lora(rank=2), torch.zeros(1, 3, 16, 16))
    run = trainer(tmp_path, model, seed=None, self_check=True, clipping="per_block")
    run.train()
    before, steps = logits(run.model), run.privacy_statement()
    run.merge_adapters()
    assert run.evaluate(Images(5))["eval_loss"] > 0
    run.save_model()
    run.create_model_card()
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors"}
    assert not (tmp_path / "adapter_config.json").exists()
    for loaded in (AutoModelForImageClassification.from_pretrained(tmp_path), load_model(tmp_path)):
        torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-5)
        assert set(loaded.state_dict()) == set(build().state_dict())
    said = json.loads((tmp_path / "privacy.json").read_text())
    assert said == steps and all("lora_" in name or "classifier" in name or "head" in name
                                 for name in said["trainable_parameters"]["trained_tensors"])  # fmt: skip
    assert "peft" not in (tmp_path / "README.md").read_text().split("---")[1]
    assert read_statement(tmp_path / "privacy.json", "privacy.json")[1] == []
    with pytest.raises(ModelRefused, match="no trainable parameter"):
        run.train()


def test_there_is_nothing_to_merge_in_a_model_without_adapters(tmp_path):
    with pytest.raises(ArgumentRefused, match="has no adapters"):
        trainer(tmp_path, tiny_vit()).merge_adapters()
