"""Every kind of source gives checked training and held-out rows."""

from __future__ import annotations

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from hf_dpvision.data import (
    Columns,
    DigitsData,
    FilesData,
    FolderData,
    HubData,
    ImageTransform,
    Preprocessing,
    Split,
    image_examples,
    load_image_data,
    load_image_stream,
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
    source = FilesData(f"{tmp_path}/train-*.parquet", f"{tmp_path}/test-*.parquet", cache_dir=str(tmp_path / "c"))
    data = load_image_data(source)
    assert (len(data.train), len(data.held_out)) == (10, 3)
    assert (data.columns, data.names) == (Columns("img", "label"), ["cat", "dog"])


def test_parquet_that_is_not_there_says_so(tmp_path):
    with pytest.raises(DataRefused, match="this data set is not on this machine"):
        load_image_data(FilesData(f"{tmp_path}/nothing-*.parquet"))


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


def test_a_stream_is_opened_and_only_its_held_out_part_is_fetched(tmp_path):
    (tmp_path / "set").mkdir()
    rows = {part: _rows(count) for part, count in (("train", 9), ("validation", 4))}
    for part, some in rows.items():
        some.to_parquet(tmp_path / "set" / f"{part}.parquet")
    split = Split(max_train=7, max_eval=3)
    data = load_image_stream(HubData(str(tmp_path / "set")), split, cache_dir=str(tmp_path / "c"))
    assert isinstance(data.train, IterableDataset) and data.size is None and data.names == ["cat", "dog"]
    assert [row["label"] for row in data.train] == rows["train"]["label"][:7]
    assert isinstance(data.held_out, Dataset) and len(data.held_out) == 3
    assert np.array_equal(np.asarray(data.held_out[2]["img"]), np.asarray(rows["validation"][2]["img"]))


def test_what_needs_random_access_is_refused_of_a_stream(tmp_path):
    for split in (Split(held_out_fraction=0.1), Split(unit_column="patient")):
        with pytest.raises(DataRefused, match="needs random access"):
            load_image_stream(DigitsData(), split)
    with pytest.raises(DataRefused, match="limited to 0 rows"):
        load_image_stream(DigitsData(), Split(max_train=0))


def test_names_of_classes_in_a_stream_become_numbers(tmp_path):
    made = _rows(6).cast_column("label", Value("int64")).map(
        lambda row: {"label": ["cat", "dog"][row["label"]]}, features=Features(img=Image(), path=Value("string"),
                                                                             label=Value("string")))  # fmt: skip
    made.to_parquet(tmp_path / "train.parquet")
    data = load_image_stream(FilesData(f"{tmp_path}/train.parquet"), class_names=["dog", "cat"])
    assert [row["label"] for row in data.train] == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_whose_paths_stand_in_a_csv_file_are_found_beside_it(tmp_path, streaming):
    (tmp_path / "scans").mkdir()
    for index in range(3):
        PILImage.new("RGB", (6, 6), (index, 0, 0)).save(tmp_path / "scans" / f"{index}.png")
    lines = ["scan,label", *(f"scans/{index}.png,{index % 2}" for index in range(3))]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    source = FilesData(f"{tmp_path}/train.csv", cache_dir=str(tmp_path / "c"), image_column="scan")
    named = {"image_column": "scan", "class_names": ["cat", "dog"]}
    data = (load_image_stream if streaming else load_image_data)(source, **named)
    paths = [row["scan"] for row in data.train]
    assert paths == [str(tmp_path / "scans" / f"{index}.png") for index in range(3)]
    if not streaming:
        assert data.training_set(lambda picture: picture.getpixel((0, 0))[0])[2]["pixel_values"] == 2


def test_a_csv_file_without_a_column_of_paths_lists_what_it_has(tmp_path):
    (tmp_path / "train.csv").write_text("scan,label\na.png,0\n")
    with pytest.raises(DataRefused, match="columns .'scan', 'label'.*image_column_name"):
        load_image_data(FilesData(f"{tmp_path}/train.csv", cache_dir=str(tmp_path / "c")))


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_archives_are_read(tmp_path, streaming):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for index in range(4):
            picture = io.BytesIO()
            PILImage.new("RGB", (6, 6), (index, 0, 0)).save(picture, "PNG")
            for name, content in ((f"{index}.png", picture.getvalue()), (f"{index}.cls", str(index % 2).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    named = {"label_column": "cls", "class_names": ["cat", "dog"]}
    source = FilesData(f"{tmp_path}/train-*.tar", cache_dir=str(tmp_path / "c"))
    data = (load_image_stream if streaming else load_image_data)(source, **named)
    assert data.columns == Columns("png", "cls") and [row["cls"] for row in data.train] == [0, 1, 0, 1]


def test_files_of_several_or_unknown_kinds_are_refused(tmp_path):
    for name in ("a.parquet", "b.csv"):
        (tmp_path / name).touch()
    with pytest.raises(DataRefused, match="files of the kinds"):
        load_image_data(FilesData(f"{tmp_path}/*"))
