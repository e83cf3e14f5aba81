"""Cached features: those of the model, computed once, private, resumable, and broken images train nothing."""

from __future__ import annotations

import io
import json
import stat

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from trainer_cases import arguments, tiny_vit

from hf_dpvision import DPTrainer, load_model
from hf_dpvision.backbone import Backbone, last_layer, set_head
from hf_dpvision.data import Columns, Preprocessing, features
from hf_dpvision.data.examples import OneByOne, Unreadable
from hf_dpvision.data.features import FeatureExamples, cached_features
from hf_dpvision.data.transforms import ImageTransform
from hf_dpvision.errors import DataRefused, LoadingError, ModelRefused
from hf_dpvision.heads import LinearProbe
from hf_dpvision.mechanism import FixedRandomness


ROWS = 21
COLUMNS = Columns("image", "label")
SMALL = Preprocessing(size=(16, 16), resize=16, mean=(0.5,) * 3, std=(0.5,) * 3)


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(16, 16, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rows(count: int = ROWS, broken: tuple[int, ...] = ()) -> Dataset:
    images = [{"bytes": b"no image" if i in broken else picture(i), "path": None} for i in range(count)]
    kinds = Features(image=Image(), label=Value("int64"))
    return Dataset.from_dict({"image": images, "label": [i % 3 for i in range(count)]}, features=kinds)


class Counting:
    """A backbone that counts the images it is given, and can be told to fail."""

    def __init__(self, backbone: Backbone, fail_after: int | None = None) -> None:
        self.backbone, self.fingerprint = backbone, backbone.fingerprint
        self.count, self.fail_after = 0, fail_after

    def __call__(self, pixels):
        if self.fail_after is not None and self.count >= self.fail_after:
            raise KeyboardInterrupt
        self.count += len(pixels)
        return self.backbone(pixels)


def cached(folder, embedding, data, **changes):
    settings = {"batch_size": 4, "quiet": True}
    return cached_features(folder, embedding, data, COLUMNS, SMALL, **settings | changes)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny_vit())


@pytest.mark.parametrize("build", [tiny_vit, lambda: load_model("timm/test_vit", num_labels=5, pretrained=False)])
def test_the_last_layer_applied_to_the_features_gives_the_logits(build):
    model = build().eval()
    pixels = torch.randn(3, 3, *(2 * [model.config.to_dict().get("image_size") or 160]))
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        found = last_layer(model)(Backbone(model)(pixels))
    assert torch.equal(found, expected)
    assert not last_layer(model)._forward_pre_hooks


def test_a_head_put_into_the_model_finds_the_classes_it_finds_on_unit_features():
    model = tiny_vit().eval()
    pixels, weight = torch.randn(50, 3, 16, 16), torch.randn(3, 16)
    unit = torch.nn.functional.normalize(Backbone(model)(pixels), dim=-1)
    set_head(model, weight)
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels).logits.argmax(-1), (unit @ weight.T).argmax(-1))
    with pytest.raises(ModelRefused, match="shape"):
        set_head(model, torch.zeros(4, 16))


def test_a_model_without_one_last_layer_is_refused():
    model = tiny_vit()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(16, 3), torch.nn.Linear(3, 3))
    with pytest.raises(ModelRefused, match="2 linear layers"):
        Backbone(model)


def test_features_are_those_of_every_image_in_its_place_and_are_computed_once(tmp_path, backbone):
    counting, data = Counting(backbone), rows()
    first = cached(tmp_path, counting, data)
    pixels = torch.stack([ImageTransform(SMALL)(row["image"]) for row in data])
    np.testing.assert_allclose(first.values, backbone(pixels), atol=1e-6)
    assert counting.count == ROWS
    again = cached(tmp_path, counting, data, batch_size=7)
    assert counting.count == ROWS
    np.testing.assert_array_equal(first.values, again.values)
    assert again.seconds == first.seconds > 0


def test_the_folder_is_its_owners_alone(tmp_path, backbone):
    place = cached(tmp_path, backbone, rows()).place
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in place.glob("*.f32")] == [0o600]
    assert sorted(file.name for file in place.iterdir()) == ["features.f32", "progress.json"]


def test_an_ended_call_is_finished_by_the_next_one_with_the_same_bytes(tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(features, "_WRITTEN_AT_ONCE", 8)
    whole = cached(tmp_path / "whole", backbone, rows()).values
    ended = Counting(backbone, fail_after=12)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "ended", ended, rows())
    (place,) = (tmp_path / "ended").iterdir()
    with (place / "features.f32").open("ab") as file:
        file.write(b"torn")  # what a kill in the middle of a write leaves
    rest = Counting(backbone)
    np.testing.assert_array_equal(cached(tmp_path / "ended", rest, rows()).values, whole)
    assert rest.count == ROWS - 8


@pytest.mark.parametrize("change", ["weights", "precision", "preprocessing", "images", "order", "torn"])
def test_features_of_something_else_are_not_taken_up(tmp_path, backbone, change):
    first = cached(tmp_path, backbone, rows())
    model, data, wanted = tiny_vit(), rows(), SMALL
    if change == "weights":
        with torch.no_grad():
            model.vit.layernorm.bias.add_(0.1)
    if change == "preprocessing":
        wanted = SMALL.cropped(0.9)
    if change == "images":
        data = rows(broken=(3,))
    if change == "order":
        data = rows().select([1, 0, *range(2, ROWS)])
    if change == "torn":
        (first.place / "progress.json").write_text(json.dumps({"format": 1}))
    counting = Counting(Backbone(model, half=change == "precision"))
    cached_features(tmp_path, counting, data, COLUMNS, wanted, batch_size=4, quiet=True)
    assert counting.count == ROWS


def test_another_head_and_other_labels_share_the_features(tmp_path, backbone):
    cached(tmp_path, backbone, rows())
    model = tiny_vit()
    torch.nn.init.normal_(model.classifier.weight)
    counting = Counting(Backbone(model))
    cached(tmp_path, counting, rows().map(lambda row: {"label": 0}))
    assert counting.count == 0


def test_a_broken_image_changes_no_other_row_and_becomes_an_example_that_trains_nothing(tmp_path, backbone, capfd):
    whole = cached(tmp_path, backbone, rows()).values
    values = cached(tmp_path, backbone, rows(broken=(0, 9))).values
    others = [i for i in range(ROWS) if i not in (0, 9)]
    np.testing.assert_array_equal(values[others], whole[others])
    examples = FeatureExamples(values, np.zeros(ROWS, np.int64))
    with pytest.raises(DataRefused, match="not finite"):
        examples[9]
    assert isinstance(OneByOne(examples)[9], Unreadable)
    assert not any(capfd.readouterr())


def test_what_cannot_be_used_is_refused(tmp_path, backbone):
    with pytest.raises(DataRefused, match="no rows"):
        cached(tmp_path, backbone, rows().select([]))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LoadingError, match="could not be kept"):
        cached(tmp_path / "file", backbone, rows())
    with pytest.raises(DataRefused, match="one label"):
        FeatureExamples(np.zeros((3, 2), np.float32), np.zeros(2, np.int64))


def test_the_global_generator_is_not_moved(tmp_path, backbone):
    before = torch.get_rng_state()
    cached(tmp_path, backbone, rows(), workers=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("batch", [40, 10])
def test_the_trainer_takes_the_steps_of_noisy_gradient_descent_in_closed_form(tmp_path, batch):
    """Full batch and Poisson batches: `W -= lr * (sum of clipped (p - y) u^T + noise) / B`, momentum, from zero."""
    from hf_dpvision.sampling import PoissonSampler

    size, width, classes, steps, rate, sigma, clip = 40, 6, 3, 3, 0.5, 0.7, 0.8
    generator = np.random.default_rng(0)
    values = generator.normal(size=(size, width)).astype(np.float32)
    labels = generator.integers(classes, size=size)
    probe = LinearProbe(width, classes)
    args = arguments(
        tmp_path, noise_multiplier=sigma, logical_batch_size=batch, max_steps=steps, learning_rate=rate,
        per_sample_max_grad_norm=clip, optim_args="momentum=0.9", target_delta=1e-3,
    )  # fmt: skip
    trainer = DPTrainer(probe, args, train_dataset=FeatureExamples(values, labels), randomness=FixedRandomness(0))
    trainer.train()
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    sampler = PoissonSampler(FixedRandomness(0).sampling_key(1), size, batch / size)
    noise = FixedRandomness(0).noise_source(torch.device("cpu"))
    weight, momentum = np.zeros((classes, width)), np.zeros((classes, width))
    for step in range(steps):
        drawn = sampler.draw(step)
        logits = unit[drawn] @ weight.T
        residual = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(classes)[labels[drawn]]
        factors = np.minimum(1, clip / np.linalg.norm(residual, axis=1, keepdims=True))
        total = (factors * residual).T @ unit[drawn] + noise(step + 1).normal((classes, width), sigma * clip).numpy()
        momentum = 0.9 * momentum + total / batch
        weight -= rate * momentum
    np.testing.assert_allclose(probe.weight.detach(), weight, atol=1e-5)
    events = [(e.sample_rate, e.noise_multiplier, e.steps) for e in trainer._run.ledger.events]
    assert events == [(batch / size, sigma, steps)]
    assert trainer.epsilon().accountant == ("gaussian" if batch == size else "rdp")


def test_images_in_files_are_told_apart_by_their_content_and_a_missing_file_is_a_broken_image(tmp_path, backbone):
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(picture(index))
    paths = [{"bytes": None, "path": str(tmp_path / f"{index}.png")} for index in range(4)]
    kinds = Features(image=Image(), label=Value("int64"))
    data = Dataset.from_dict({"image": paths, "label": [0] * 4}, features=kinds)
    first = cached(tmp_path / "cache", backbone, data).values
    np.testing.assert_array_equal(first, cached(tmp_path / "cache", Counting(backbone, fail_after=0), rows(4)).values)
    (tmp_path / "2.png").unlink()
    missing = cached(tmp_path / "cache", backbone, data).values
    assert np.isnan(missing[2]).all()
    np.testing.assert_array_equal(missing[[0, 1, 3]], first[[0, 1, 3]])
