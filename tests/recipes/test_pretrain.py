"""The public starting point of the embedded default: its drawn digits, its script, and the committed weights."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from loading import loaded_recipe
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification


RECIPES = Path(__file__).parents[2] / "recipes"
WEIGHTS = RECIPES / "digits_beit"
TRAINING_SCANS = 1437


@pytest.fixture(scope="module")
def pretrain() -> Iterator[ModuleType]:
    with loaded_recipe("pretrain_synthetic_digits") as module:
        yield module


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_seed_draws_the_same_digits(pretrain):
    images, labels = pretrain.draw_batch(20, np.random.default_rng(7))
    again, same_labels = pretrain.draw_batch(20, np.random.default_rng(7))
    assert torch.equal(labels, same_labels)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in again]


@pytest.mark.parametrize("digit", range(10))
def test_a_drawn_digit_is_an_8x8_scan_of_17_grey_levels(pretrain, digit):
    levels = {level * 255 // 16 for level in range(17)}
    rng = np.random.default_rng(digit)
    for _ in range(20):
        scan = np.asarray(pretrain.draw_digit(digit, rng))
        assert scan.shape == (8, 8)
        assert set(np.unique(scan).tolist()) <= levels
        assert 3 < scan.sum() / 255 < 50  # some ink, some paper, in pixels


def test_labels_are_spread_over_all_ten_digits(pretrain):
    _, labels = pretrain.draw_batch(400, np.random.default_rng(0))
    assert torch.bincount(labels, minlength=10).min() > 20


def test_two_short_runs_write_the_same_weights_with_their_hash(pretrain, tmp_path):
    short = ["--steps", "2", "--batch_size", "4", "--held_out", "4", "--output_dir"]
    digests = []
    for name in ("first", "second"):
        pretrain.main([*short, str(tmp_path / name)])
        digests.append(_sha256(tmp_path / name / "model.safetensors"))
    assert digests[0] == digests[1]
    readme = (tmp_path / "first" / "README.md").read_text(encoding="utf-8")
    assert digests[0] in readme
    assert str(tmp_path) not in readme
    assert (tmp_path / "first" / "preprocessor_config.json").exists()


def test_zero_steps_are_refused(pretrain, capsys):
    with pytest.raises(SystemExit):
        pretrain.parse_options(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


def test_committed_weights_have_the_hash_and_size_that_their_readme_states():
    readme = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"SHA-256 of `model.safetensors` \| `([0-9a-f]{64})`", readme)
    assert stated is not None
    assert stated[1] == _sha256(WEIGHTS / "model.safetensors")
    assert (WEIGHTS / "model.safetensors").stat().st_size < 4_000_000


def test_committed_config_is_the_model_that_the_script_builds(pretrain):
    built, committed = pretrain.build_model().config, AutoConfig.from_pretrained(WEIGHTS)
    same = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "intermediate_size", "id2label")
    assert {name: getattr(built, name) for name in same} == {name: getattr(committed, name) for name in same}


def test_committed_model_reads_newly_drawn_digits(pretrain):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(WEIGHTS)
    processor = AutoImageProcessor.from_pretrained(WEIGHTS)
    accuracy = pretrain.synthetic_accuracy(model, processor, 300, np.random.default_rng(12345))
    assert accuracy > 0.9
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_default_config_promises_a_meaningful_privacy_level():
    config = yaml.safe_load((RECIPES / "digits_beit.yaml").read_text(encoding="utf-8"))
    assert 0 < float(config["target_epsilon"]) <= 8
    assert 0 < float(config["target_delta"]) < 1 / TRAINING_SCANS
