"""The scattering transform is what its formulas say, the release is bounded, and the recipe charges both its parts."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from loading import loaded_recipe
from PIL import Image

from hf_dpvision.accounting import Event, Ledger
from hf_dpvision.config import parse_arguments
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.noise import NoiseSource


SCRIPT = Path(__file__).parents[2] / "recipes" / "scatter.py"


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    with loaded_recipe("scatter") as module:
        yield module


@pytest.fixture(scope="module")
def transform(recipe) -> ModuleType:
    return sys.modules["scattering.transform"]


@pytest.fixture(scope="module")
def standardised(recipe) -> ModuleType:
    return sys.modules["scattering.standardised"]


def correlated(field: np.ndarray, window: np.ndarray, step: int) -> np.ndarray:
    """The slow truth: a loop over places, margins reflected by numpy."""
    margin = len(window) // 2
    padded = np.pad(field, margin, mode="reflect")
    places = range(0, len(field), step)
    cut = [[padded[i : i + len(window), j : j + len(window)] for j in places] for i in places]
    return np.array([[(piece * window).sum() for piece in row] for row in cut])


def test_features_are_those_of_the_formulas(transform):
    picture = np.random.default_rng(0).random((16, 16))
    found = transform.Scattering()(torch.tensor(picture)[None, None]).reshape(81, 4, 4).numpy()
    wide, narrow = transform.gaussian(1.6).numpy(), transform.gaussian(0.8).numpy()
    angles = [math.pi * number / 8 for number in range(8)]
    np.testing.assert_allclose(found[0], correlated(picture, wide, 4), atol=1e-5)
    first = np.abs(correlated(picture, transform.morlet(0, angles[3]).numpy(), 1))
    np.testing.assert_allclose(found[1 + 3], correlated(first, wide, 4), atol=1e-5)
    coarse = np.abs(correlated(picture, transform.morlet(1, angles[2]).numpy(), 2))
    np.testing.assert_allclose(found[9 + 2], correlated(coarse, narrow, 2), atol=1e-5)
    second = np.abs(correlated(first, transform.morlet(1, angles[5]).numpy(), 2))
    np.testing.assert_allclose(found[17 + 3 * 8 + 5], correlated(second, narrow, 2), atol=1e-5)


def test_wavelets_have_sum_zero_and_see_waves_of_their_own_direction_and_length(transform):
    assert float(transform.gaussian(1.6).sum()) == pytest.approx(1)
    for scale in (0, 1):
        for direction in (0.0, math.pi / 4):
            wave = transform.morlet(scale, direction)
            assert abs(complex(wave.sum())) < 1e-12
            reach = len(wave) // 2
            row, column = torch.meshgrid(*[torch.arange(-reach, reach + 1).double()] * 2, indexing="ij")

            def seen(angle: float, length: int, wave=wave, row=row, column=column) -> float:
                along = row * math.cos(angle) + column * math.sin(angle)
                return float((wave.conj() * torch.exp(1j * 3 * math.pi / 4 / 2**length * along)).sum().abs())

            assert seen(direction, scale) > 0.9
            assert seen(direction + math.pi / 2, scale) < 0.1 and seen(direction, 1 - scale) < 0.6


def test_a_flat_picture_has_only_its_brightness_and_pictures_do_not_mix(transform):
    scattering = transform.Scattering()
    flat = scattering(torch.full((1, 3, 16, 16), 0.7)).reshape(3, 81, 16)
    assert torch.allclose(flat[:, 0], torch.tensor(0.7)) and float(flat[:, 1:].abs().max()) < 1e-6
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([scattering(picture[None]) for picture in pictures])
    assert torch.allclose(scattering(pictures), alone, atol=1e-6)


def test_one_example_moves_the_released_sums_by_no_more_than_the_bound(standardised):
    features = np.random.default_rng(0).random((20, 3 * 4)).astype(np.float32)
    features[7] *= 1e6
    features[8] = np.nan
    scale = torch.full((6,), 0.5, dtype=torch.float64)
    everyone = standardised.channel_moments(features, 3, scale, bound=1.5)
    for left_out in range(20):
        others = np.delete(features, left_out, axis=0)
        moved = (everyone.sums - standardised.channel_moments(others, 3, scale, bound=1.5).sums).norm()
        assert float(moved) <= everyone.clipping.sensitivity() * (1 + 1e-12)
        assert (left_out == 8) == (float(moved) == 0)


def test_statistics_are_those_of_the_data_where_nothing_is_clipped_and_noise_is_small(standardised):
    features = np.random.default_rng(0).normal(2.0, 0.5, (500, 3 * 4)).astype(np.float32)
    ledger = Ledger()
    exact = standardised.channel_moments(features, 3, torch.ones(6).double(), bound=100.0)
    found = exact.released(0.01, ledger, NoiseSource.from_os_entropy())
    assert ledger.events == (Event(1.0, 0.01, 1),)
    np.testing.assert_allclose(found.mean, features.reshape(500, 3, 4).mean((0, 2)), atol=0.05)
    np.testing.assert_allclose(found.deviation, features.reshape(500, 3, 4).std((0, 2)), atol=0.2)


def striped(number: int, generator: np.random.Generator) -> np.ndarray:
    """A noisy picture whose stripes run down for even numbers, and across for odd ones."""
    stripes = np.zeros((16, 16))
    stripes[::4] = stripes[1::4] = 150
    return ((stripes if number % 2 else stripes.T) + generator.integers(0, 100, (16, 16))).astype(np.uint8)


def test_a_head_on_standardised_features_tells_stripes_apart(transform, standardised):
    generator = np.random.default_rng(0)
    pixels = torch.tensor(np.stack([striped(number, generator) for number in range(40)]))[:, None].float() / 255
    features, labels = transform.Scattering()(pixels.expand(-1, 3, -1, -1)), torch.arange(40) % 2
    blocks = features.double().unflatten(1, (243, 16))
    averages = torch.cat([blocks.mean((0, 2)), blocks.square().mean((0, 2))])
    given = standardised.statistics(averages, torch.ones_like(averages))
    head = standardised.StandardisedProbe(2, given, 16)
    for _ in range(20):
        torch.nn.functional.cross_entropy(head(features[:30]), labels[:30]).backward()
        with torch.no_grad():
            head.weight -= 10 * head.weight.grad
            head.weight.grad = None
    assert head.accuracy(features[30:].numpy(), labels[30:].numpy()) == 1
    assert head.accuracy(np.full((2, 243 * 16), np.nan, np.float32), np.zeros(2, np.int64)) == 0


def pictures(folder: Path) -> str:
    """Thirty striped pictures as a file of the usual columns."""
    generator = np.random.default_rng(0)
    encoded, labels = [], []
    for number in range(30):
        file = io.BytesIO()
        Image.fromarray(striped(number, generator)).convert("RGB").save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
        labels.append(number % 2)
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(num_classes=2))
    folder.mkdir()
    datasets.Dataset.from_dict({"img": encoded, "label": labels}, features=features).to_parquet(folder / "a.parquet")
    return str(folder / "a.parquet")


def test_a_run_charges_both_releases_and_leaves_its_record(recipe, tmp_path):
    small = {"train_files": pictures(tmp_path / "stripes"), "train_val_split": 0.3, "image_size": 16, "steps": 4}
    small |= {"batch_size": 10, "target_delta": 1e-2, "epsilons": 30, "features_dir": tmp_path / "features"}
    small |= {"record": tmp_path / "record.jsonl", "keep_features": False, "standardisation_noise": 2}
    record = recipe.main([text for name, value in small.items() for text in (f"--{name}", str(value))])
    (score,) = record.scores
    assert [event["steps"] for event in score.events] == [1, 4]
    composed = Ledger(Event(**event) for event in score.events).epsilon(1e-2)
    assert score.upper == composed.upper and 25 < score.upper <= 30
    assert 0 <= score.mean <= 1
    line = json.loads((tmp_path / "record.jsonl").read_text())
    assert line["name"] == "scatter" and line["scores"][0]["accuracies"] == score.accuracies
    assert str(tmp_path) not in json.dumps(line) and list((tmp_path / "features").iterdir()) == []


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "exactly one of dataset_name"),
        (["--train_files", "a.parquet", "--image_size", "18"], "multiple of 4"),
        (["--train_files", "a.parquet", "--repeats", "0"], "at least one fit"),
    ],
)
def test_what_cannot_be_run_is_refused(recipe, more, message):
    with pytest.raises(ArgumentRefused, match=message):
        recipe.main([*more, "--epsilons", "3"])


def test_a_first_release_that_spends_everything_is_refused(recipe):
    args = recipe.ScatterArguments(standardisation_noise=1.0, steps=2, batch_size=10)
    with pytest.raises(ArgumentRefused, match="nothing is left"):
        recipe.noise_beside(1.0, 3.0, 100, args)


def test_the_configuration_is_that_of_the_paper(recipe):
    config = SCRIPT.parent / "scattering" / "cifar10.yaml"
    parsed = parse_arguments([recipe.ScatterArguments], ["--config", str(config)], path_fields=recipe.PATHS)
    (args,) = parsed.groups
    assert (args.epsilons, args.batch_size, args.clip_norm, args.target_delta) == ([3.0], 8192, 0.1, 1e-5)
    assert args.steps == round(60 * 50_000 / 8192)
