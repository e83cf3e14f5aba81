"""Every kind of source gives checked training and held-out rows."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from hf_dpvision.data import (
    Columns,
    DigitsData,
    FolderData,
    HubData,
    ImageTransform,
    ParquetData,
    Preprocessing,
    Split,
    StreamedData,
    image_examples,
    load_image_data,
)
from hf_dpvision.errors import DataRefused


def _rows(count: int, names: tuple[str, ...] = ("cat", "dog")) -> Dataset:
    pixels = np.random.default_rng(count).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    features = Features({"img": Image(), "label": ClassLabel(names=list(names)), "path": Value("string")})
    columns = {
        "img": [PILImage.fromarray(picture) for picture in pixels],
        "label": [index % len(names) for index in range(count)],
        "path": [f"{index}.png" for index in range(count)],
    }
    return Dataset.from_dict(columns, features=features)


class _Fixed:
    def __init__(self, **parts: Dataset) -> None:
        self.parts = DatasetDict(parts)

    def load(self) -> DatasetDict:
        return self.parts


def test_parquet_globs_are_read(tmp_path):
    for shard in range(2):
        _rows(5).to_parquet(tmp_path / f"train-{shard}.parquet")
    _rows(3).to_parquet(tmp_path / "test-0.parquet")
    source = ParquetData(f"{tmp_path}/train-*.parquet", f"{tmp_path}/test-*.parquet", cache_dir=str(tmp_path / "c"))
    data = load_image_data(source)
    assert (len(data.train), len(data.held_out)) == (10, 3)
    assert (data.columns, data.names) == (Columns("img", "label"), ["cat", "dog"])


def test_parquet_that_is_not_there_says_so(tmp_path):
    with pytest.raises(DataRefused, match="this data set is not on this machine"):
        load_image_data(ParquetData(f"{tmp_path}/nothing-*.parquet"))


def test_image_folders_are_read_with_their_class_names(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                PILImage.new("RGB", (6, 6), (index, 0, 0)).save(folder / f"{index}.png")
    source = FolderData(str(tmp_path / "train"), str(tmp_path / "val"), cache_dir=str(tmp_path / "c"))
    data = load_image_data(source)
    assert (len(data.train), len(data.held_out), data.names) == (8, 4, ["cat", "dog"])


def test_an_image_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(DataRefused, match="does not exist"):
        load_image_data(FolderData(str(tmp_path / "absent")))


def test_a_hub_name_that_is_a_local_folder_is_read(tmp_path):
    (tmp_path / "set").mkdir()
    _rows(4).to_parquet(tmp_path / "set" / "train.parquet")
    data = load_image_data(HubData(str(tmp_path / "set"), cache_dir=str(tmp_path / "c")))
    assert len(data.train) == 4 and data.held_out is None


def test_digits_are_there_without_any_file():
    data = load_image_data(DigitsData())
    assert (len(data.train), len(data.held_out), len(data.names)) == (1437, 360, 10)


def test_a_named_part_that_is_absent_lists_those_present():
    with pytest.raises(DataRefused, match="no part 'test'; parts present: train"):
        load_image_data(_Fixed(train=_rows(4)), Split(evaluation="test"))


@pytest.mark.parametrize(("parts", "expected"), [(("train", "test"), 3), (("train", "test", "validation"), 2)])
def test_validation_is_preferred_to_test(parts, expected):
    sizes = {"train": 5, "test": 3, "validation": 2}
    data = load_image_data(_Fixed(**{part: _rows(sizes[part]) for part in parts}))
    assert len(data.held_out) == expected


def test_a_held_out_part_can_be_set_aside_and_does_not_overlap():
    data = load_image_data(_Fixed(train=_rows(20)), Split(held_out_fraction=0.25, seed=1))
    train, held_out = set(data.train["path"]), set(data.held_out["path"])
    assert (len(train), len(held_out), train & held_out) == (15, 5, set())
    again = load_image_data(_Fixed(train=_rows(20)), Split(held_out_fraction=0.25, seed=1))
    assert again.held_out["path"][:] == data.held_out["path"][:]


def test_a_subset_is_random_fixed_by_the_seed_and_never_larger_than_the_data():
    def chosen(seed: int, most: int) -> list[str]:
        return load_image_data(_Fixed(train=_rows(20)), Split(max_train=most, seed=seed)).train["path"][:]

    assert chosen(0, 5) == chosen(0, 5) != chosen(1, 5)
    assert len(chosen(0, 5)) == 5 and len(chosen(0, 100)) == 20
    with pytest.raises(DataRefused, match="max_train_samples must be at least 1"):
        chosen(0, 0)


def test_units_are_set_aside_whole():
    rows = _rows(40).add_column("patient", [index % 10 for index in range(40)])
    split = Split(held_out_fraction=0.25, seed=1, unit_column="patient")
    data = load_image_data(_Fixed(train=rows), split)
    train, held_out = set(data.train["patient"]), set(data.held_out["patient"])
    assert (len(train), len(held_out), train & held_out) == (7, 3, set())
    assert (len(data.train), len(data.held_out)) == (28, 12)
    assert load_image_data(_Fixed(train=rows), split).train["path"][:] == data.train["path"][:]
    with pytest.raises(DataRefused, match="2 units of column 'patient' leaves none to train on"):
        few = _rows(4).add_column("patient", ["a", "b", "a", "b"])
        load_image_data(_Fixed(train=few), Split(held_out_fraction=0.9, unit_column="patient"))


def test_parts_that_order_their_classes_differently_are_refused():
    with pytest.raises(DataRefused, match="the same number would mean different classes"):
        load_image_data(_Fixed(train=_rows(4), test=_rows(4, ("dog", "cat"))))


def test_bad_labels_of_the_held_out_part_are_refused_too():
    hidden = _rows(2).cast_column("label", Value("int64")).map(lambda row: {"label": -1})
    names = ["cat", "dog"]
    with pytest.raises(DataRefused, match="part 'held-out'.*negative"):
        load_image_data(_Fixed(train=_rows(4), test=hidden), class_names=names)


def test_examples_are_read_one_by_one_and_by_workers():
    plain = Preprocessing(size=(6, 6), resize=6, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    rows = _rows(6)
    examples = image_examples(rows, Columns("img", "label"), ImageTransform(plain))
    assert len(pickle.loads(pickle.dumps(examples))) == 6
    expected = torch.from_numpy(np.asarray(rows[3]["img"]).copy()).permute(2, 0, 1) / 255
    assert torch.allclose(examples[3]["pixel_values"], expected)
    batches = list(DataLoader(examples, batch_size=4, num_workers=1))
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 0, 1], [0, 1]]
    assert batches[0]["pixel_values"].shape == (4, 3, 6, 6)


def test_an_example_that_cannot_be_read_is_named_by_its_index():
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": [{"bytes": b"?", "path": None}], "label": [0]}, features=features)
    plain = Preprocessing(size=(6, 6), resize=6, mean=(0.0,), std=(1.0,))
    with pytest.raises(DataRefused, match="example 0 of part 'train'"):
        image_examples(rows, Columns("image", "label"), ImageTransform(plain))[0]


def test_a_stream_is_only_used_to_keep_its_first_rows(tmp_path):
    (tmp_path / "set").mkdir()
    rows = _rows(9)
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    data = load_image_data(StreamedData(str(tmp_path / "set"), rows=4, cache_dir=str(tmp_path / "c")))
    assert isinstance(data.train, Dataset) and data.train["path"][:] == rows["path"][:4]
    assert np.array_equal(np.asarray(data.train[2]["img"]), np.asarray(rows[2]["img"]))
