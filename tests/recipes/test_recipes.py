"""The recipe runs end to end on tiny data, says what it must, keeps quiet about the rest, and refuses in time.

Long, because one recipe with many options makes for many properties of one thing.
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from loading import loaded_recipe
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessor,
)

from hf_dpvision import DPTrainer, DPTrainingArguments, cli
from hf_dpvision.config import parse_arguments
from hf_dpvision.errors import ArgumentRefused, DataRefused, RefusedError
from hf_dpvision.recipe.arguments import PATHS, DataTrainingArguments, ModelArguments, resume_point
from hf_dpvision.recipe.preparing import unused_folder


RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPT = RECIPES / "finetune_image_classification.py"


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    with loaded_recipe("finetune_image_classification") as module:
        yield module


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a tiny model, 24 + 12 pictures of two classes, and a configuration that uses them."""
    folder = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BeitConfig(image_size=16, patch_size=8, num_labels=2, use_relative_position_bias=True, **sizes)
    BeitForImageClassification(config).save_pretrained(folder / "model")
    BeitImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for brightness, name in ((60, "dark"), (200, "light")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.normal(brightness, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


CONFIG = """
model_name_or_path: ./model
train_dir: train
validation_dir: test
cache_dir: cache
train_transform: flip_crop
target_epsilon: 8
target_delta: 1e-3
logical_batch_size: 12
max_steps: 3
learning_rate: 5e-3
per_device_train_batch_size: 5
save_strategy: no
self_check: false
use_cpu: true
run_report: false
output_dir: out
"""


def _run(recipe: ModuleType, workplace: Path, *overrides: str):
    return recipe.main(["--config", str(workplace / "tiny.yaml"), *overrides])


def test_a_run_leaves_model_statement_card_results_and_a_row(recipe, workplace, capsys):
    out, table = workplace / "full", workplace / "table.md"
    record = _run(
        recipe, workplace, "--output_dir", str(out), "--compare_non_private", "--results_table", str(table),
        "--self_check", "true", "--non_private_learning_rate", "0.02",
    )
    assert set(record.scores) == {"before", "private", "non_private"}
    assert 0 < record.epsilon <= 8 and record.delta == 1e-3

    statement = json.loads((out / "privacy.json").read_text())
    assert statement["guarantee"]["epsilon"] == record.epsilon and statement["guarantee"]["delta"] == 1e-3
    assert statement["steps"] == 3 and statement["dataset"] == "train"
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["differential_privacy"]["guarantee"]["epsilon"] == record.epsilon
    assert json.loads((out / "results.json").read_text())["scores"] == record.scores
    assert f"| `{record.recipe}` | `{record.command}` |" in table.read_text()

    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.id2label == {0: "dark", 1: "light"}
    assert AutoImageProcessor.from_pretrained(out).size["height"] == 16

    printed = capsys.readouterr().out
    assert "before fine-tuning" in printed and "non-private" in printed and "epsilon <= 8.00" in printed
    assert "not covered by epsilon" in printed and str(out / "privacy.json") in printed
    everything = printed + "".join(path.read_text() for path in out.glob("*.json")) + (out / "README.md").read_text()
    assert "train_loss" not in everything and "'loss'" not in everything
    assert str(workplace) not in (out / "README.md").read_text() + (out / "results.json").read_text()


def test_the_released_model_is_the_private_one_and_was_trained(recipe, workplace):
    out = workplace / "released"
    _run(recipe, workplace, "--output_dir", str(out), "--train_layers", "head", "--head_init", "zero")
    before = AutoModelForImageClassification.from_pretrained(workplace / "model").state_dict()
    after = AutoModelForImageClassification.from_pretrained(out).state_dict()
    assert changed(before, after) == {"classifier.weight", "classifier.bias"}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that differ; there are the same ones before and after."""
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("layers", ["last-1", "lora"])
def test_last_blocks_and_adapters_are_trained_and_released_in_an_ordinary_model(recipe, workplace, layers):
    pytest.importorskip("peft")
    out = workplace / layers
    record = _run(
        recipe, workplace, "--output_dir", str(out), "--train_layers", layers, "--lora_rank", "2",
        "--self_check", "true", "--clipping", "per_layer", "--compare_non_private",
    )  # fmt: skip
    assert record.trained.startswith(f"{layers}, ") and set(record.scores) == {"before", "private", "non_private"}
    model = AutoModelForImageClassification.from_pretrained(out)
    before = AutoModelForImageClassification.from_pretrained(workplace / "model").state_dict()
    names = changed(before, model.state_dict())
    linear = {name for name in before if name.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))}
    block = {name for name in before if name.startswith("beit.layers.0.")}
    behind = {"classifier.weight", "classifier.bias"}
    if layers == "lora":
        assert names == linear | behind
    else:
        assert linear | behind <= names <= block | behind | {name for name in before if ".pooler." in name}
    assert not list(out.glob("adapter*")) and model.config.id2label == {0: "dark", 1: "light"}
    assert len(json.loads((out / "privacy.json").read_text())["clipping"]["groups"]) > 6


def test_adapters_and_merged_weights_do_not_share_a_repository(recipe, workplace):
    with pytest.raises(ArgumentRefused, match="train_layers='last'"):
        _run(recipe, workplace, "--train_layers", "last")
    words = ["--output_dir", str(workplace / "x"), "--train_layers", "lora", "--push_to_hub", "true"]
    with pytest.raises(ArgumentRefused, match="hub_strategy='end'"):
        _run(recipe, workplace, *words)


def test_both_trainings_start_from_the_same_model_on_the_same_data(recipe, workplace, monkeypatch):
    starts = []
    original = DPTrainer.train

    def train(self, *arguments, **options):
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        starts.append((self.args.disable_dp, weights, self.train_dataset))
        return original(self, *arguments, **options)

    monkeypatch.setattr(DPTrainer, "train", train)
    _run(recipe, workplace, "--output_dir", str(workplace / "same"), "--compare_non_private")
    (first, weights, data), (second, other_weights, other_data) = starts
    assert (first, second) == (False, True) and data is other_data
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_without_privacy_nothing_is_claimed(recipe, workplace):
    out = workplace / "plain"
    record = _run(recipe, workplace, "--output_dir", str(out), "--disable_dp")
    assert record.epsilon is None and set(record.scores) == {"before", "non_private"}
    assert "without a privacy guarantee" in (out / "README.md").read_text()
    assert json.loads((out / "privacy.json").read_text())["guarantee"]["epsilon"] == "inf"


def test_another_image_size_is_used_and_saved(recipe, workplace):
    out = workplace / "crop"
    _run(recipe, workplace, "--output_dir", str(out), "--crop_pct", "0.5")
    settings = AutoImageProcessor.from_pretrained(out).to_dict()
    assert settings["size"] == {"shortest_edge": 32} and settings["do_center_crop"]


def test_training_images_can_be_held_out(recipe, workplace):
    text = CONFIG.replace("validation_dir: test", "train_val_split: 0.25")
    (workplace / "cut.yaml").write_text(text)
    record = recipe.main(["--config", str(workplace / "cut.yaml"), "--output_dir", str(workplace / "cut")])
    assert "18 train and 6 held-out images" in record.data


def test_patients_are_protected_as_a_whole(recipe, workplace, capsys):
    generator = np.random.default_rng(0)
    names = ["dark", "light"]
    columns = {
        "image": [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(48)],
        "label": [index % 2 for index in range(48)],
        "patient": [f"planted-{index % 16}" for index in range(48)],
        "scan": list(range(48)),
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names),
         "patient": datasets.Value("string"), "scan": datasets.Value("int64")}
    )  # fmt: skip
    datasets.Dataset.from_dict(columns, features=features).to_parquet(workplace / "patients.parquet")
    text = CONFIG.replace("train_dir: train\n", "train_files: patients.parquet\n").replace(
        "validation_dir: test", "train_val_split: 0.25"
    )
    (workplace / "patients.yaml").write_text(text + "privacy_unit_column: patient\nid_column: scan\n")
    out = workplace / "patients"
    record = recipe.main(
        ["--config", str(workplace / "patients.yaml"), "--output_dir", str(out), "--examples_per_unit", "2",
         "--logical_batch_size", "6", "--self_check", "true"]
    )  # fmt: skip
    statement = json.loads((out / "privacy.json").read_text())
    assert statement["grouping"] == {"column": "patient", "examples_per_unit": 2}
    assert statement["sampling"]["dataset_size"] == 12 and "36 train and 12 held-out images" in record.data
    printed = capsys.readouterr().out
    assert "unit: all training images with the same value in column 'patient', at most 2" in printed
    assert "unit of privacy" in (out / "README.md").read_text()
    assert not [path for path in out.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["--dataset_name", "digits"], ArgumentRefused, "exactly one of dataset_name, train_dir and train_files"),
        (["--train_dir", "no-such-folder"], DataRefused, "does not exist"),
        (["--label_column_name", "species"], DataRefused, "columns present: image, label"),
        (["--eval_split", "extra"], DataRefused, "parts present: train, validation"),
        (["--learning_rat", "1"], ArgumentRefused, "did you mean 'learning_rate'"),
        (["--target_epsilon", "-1"], ArgumentRefused, "target_epsilon"),
        (["--model_name_or_path", "./no-such-model"], RefusedError, "no-such-model"),
        (["--class_names", "a", "b", "c"], DataRefused, "declares 2 classes"),
        (["--privacy_unit_column", "patient"], DataRefused, "'patient' is not a column of part 'train'"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(recipe, workplace, monkeypatch, overrides, error, message):
    monkeypatch.setattr(DPTrainer, "training_step", lambda *arguments: pytest.fail("a step was taken"))
    with pytest.raises(error, match=message):
        _run(recipe, workplace, "--output_dir", str(workplace / "refused"), *overrides)
    assert not (workplace / "refused").exists()


def test_an_unreadable_image_is_refused_before_the_first_step(recipe, workplace):
    broken = workplace / "train" / "dark" / "99.png"
    broken.write_bytes(b"no image")
    try:
        with pytest.raises(DataRefused, match=r"example \d+ of part 'train' cannot be read"):
            _run(recipe, workplace, "--output_dir", str(workplace / "refused"))
    finally:
        broken.unlink()


WITH_RESULTS = {"digits_beit.yaml", "cifar10_deit_tiny.yaml", "cifar100_deit_tiny.yaml"}


@pytest.mark.parametrize("config", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_every_shipped_configuration_is_accepted(recipe, config):
    parsed = parse_arguments(
        [ModelArguments, DataTrainingArguments, DPTrainingArguments],
        ["--config", str(RECIPES / config)],
        path_fields=PATHS,
    )
    _, data_args, training_args = parsed.groups
    assert data_args.compare_non_private == (config in WITH_RESULTS)
    assert training_args.target_epsilon <= 8 and math.isfinite(training_args.target_delta)


@pytest.mark.parametrize("config", ["cifar10_deit_tiny.yaml", "cifar100_deit_tiny.yaml"])
def test_a_cifar_configuration_says_when_its_data_is_absent(recipe, tmp_path, config):
    with pytest.raises(DataRefused, match="this data set is not on this machine"):
        recipe.main(["--config", str(RECIPES / config), "--train_files", str(tmp_path / "train-*.parquet")])


def test_the_script_ends_with_one_line_and_an_exit_code_on_bad_input(workplace):
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", str(workplace / "tiny.yaml"), "--train_dir", "absent"],
        capture_output=True, text=True, cwd=workplace, env=environment, check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("DataRefused: the image folder 'absent'")


def test_a_second_run_leaves_the_folder_of_the_first_alone(recipe, tmp_path, capsys):
    folder = tmp_path / "out"
    assert unused_folder(folder, print) == folder and not capsys.readouterr().out
    for number, name in ((2, "out-2"), (3, "out-3")):
        used = folder if number == 2 else tmp_path / "out-2"
        (used / "privacy").mkdir(parents=True)
        (used / "privacy" / "ledger.jsonl").touch()
        assert unused_folder(folder, print) == tmp_path / name
    assert "their epsilons add up" in capsys.readouterr().out


def test_resuming_is_asked_for_as_in_the_official_example(recipe, tmp_path):
    for asked, point in ((None, None), ("true", True), ("out/checkpoint-3", "out/checkpoint-3")):
        args = DPTrainingArguments(
            str(tmp_path), target_epsilon=1, target_delta=1e-5, logical_batch_size=2, resume_from_checkpoint=asked
        )
        assert resume_point(args) == point


NAMES = {
    "imagenet1k_vit_small": ("image", "label", 1000),
    "food101_beit_base": ("image", "label", 101),
    "cifar10_beit_large": ("img", "label", 10),
    "cifar100_beit_large": ("img", "fine_label", 100),
}


def stand_in(folder: Path, image: str, label: str, classes: int) -> Path:
    """Files named and typed as on the Hub: an image and a label, two parts, JPEGs of several kinds."""
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(num_classes=classes)})
    generator = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    for part, files, count in (("train", 3, 48), ("validation", 1, 8)):
        for number in range(files):
            pixels = generator.integers(0, 256, (count // files, 20, 24, 3), np.uint8)
            pictures = [Image.fromarray(one) for one in pixels]
            pictures[0] = pictures[0].convert("L")
            pictures[1] = pictures[1].convert("CMYK")
            encoded = [{"bytes": _jpeg(picture), "path": None} for picture in pictures]
            labels = generator.integers(0, classes, len(encoded)).tolist()
            rows = datasets.Dataset.from_dict({image: encoded, label: labels}, features=features)
            rows.to_parquet(folder / "data" / f"{part}-{number:05}-of-{files:05}.parquet")
    return folder


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("config", "sampling"),
    [("imagenet1k_vit_small", "windows"), ("imagenet1k_vit_small", "materialise"), ("food101_beit_base", None),
     ("cifar10_beit_large", None), ("cifar100_beit_large", None)],
)  # fmt: skip
def test_a_configuration_for_data_that_is_not_here_runs_on_a_stand_in(recipe, workplace, tmp_path, config, sampling):
    data = stand_in(tmp_path / "set", *NAMES[config])
    changed = {
        "dataset_name": data, "model_name_or_path": workplace / "model", "image_size": 16, "max_steps": 5,
        "train_dataset_size": 48, "logical_batch_size": 12, "target_delta": 1e-3, "per_device_train_batch_size": 5,
        "auto_find_batch_size": False, "dataloader_num_workers": 0, "output_dir": tmp_path / "out",
        "cache_dir": tmp_path / "cache", "use_cpu": True, "self_check": False, "save_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip
    if sampling is not None:
        changed |= {"stream_sampling": sampling, "stream_window_steps": 2}
    words = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    record = recipe.main(["--config", str(RECIPES / f"{config}.yaml"), *words])
    assert record.data.endswith("48 train and 8 held-out images") and record.epsilon <= 8
    statement = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert statement["steps"] == 5 and statement["sampling"]["dataset_size"] == 48
    if "beit_large" in config:  # every parameter is trained, the ones that others freeze as well
        assert record.epsilon <= 1
        trained = statement["trainable_parameters"]
        assert trained["scope"] == "all" and trained["frozen"] == 0
        assert any(name.endswith("relative_position_bias_table") for name in trained["trained_tensors"])
    assert not (tmp_path / "out" / "stream").exists()


def test_the_configuration_for_a_folder_of_ones_own_runs(recipe, workplace, tmp_path):
    folders = ["--train_dir", str(workplace / "train"), "--validation_dir", str(workplace / "test")]
    small = ["--model_name_or_path", str(workplace / "model"), "--image_size", "16", "--logical_batch_size", "12"]
    short = ["--max_steps", "2", "--target_delta", "1e-3", "--per_device_train_batch_size", "5", "--use_cpu", "true"]
    out = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--save_strategy", "no"]
    out += ["--auto_find_batch_size", "false"]
    record = recipe.main(["--config", str(RECIPES / "your_folder.yaml"), *folders, *small, *short, *out])
    assert record.epsilon <= 8 and "accuracy" in record.scores["private"]
    assert "accuracy" not in (tmp_path / "out" / "README.md").read_text()  # it is measured on private images


def test_the_command_line_runs_the_recipe_and_answers_in_json(workplace, capsys):
    words = ["--config", str(workplace / "tiny.yaml"), "--output_dir", str(workplace / "command")]
    # evaluating while training means training
    assert cli.main(["train", *words, "--json", "--eval_strategy", "steps", "--eval_steps", "2"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads((workplace / "command" / "results.json").read_text())
    assert json.loads(told.out)["command"].startswith("hf-dpvision train --config tiny.yaml")
    assert "before fine-tuning" in told.err and 0 < json.loads(told.out)["epsilon"] <= 8
    assert cli.main(["train", *words, "--train_dir", "absent"]) == 1
    assert capsys.readouterr().err.startswith("hf-dpvision train: the image folder 'absent'")
