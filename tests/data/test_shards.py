"""Rows of a stream are kept whole, once and in order, whatever ends the pass; nobody else can read them."""

from __future__ import annotations

import io
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset
from PIL import Image as PILImage

from hf_dpvision.data import shards
from hf_dpvision.data.columns import Columns
from hf_dpvision.data.streams import RowStream, as_stream, image_stream, read_head
from hf_dpvision.errors import DataRefused, LoadingError


ROWS, SHARD = 1300, 512


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_ROWS", SHARD)


class Ended(Exception):
    """Stands for a kill."""


def numbers(count: int = ROWS, order: int = 1) -> RowStream:
    def rows():
        for i in range(count)[::order]:
            yield {"value": i, "label": i % 7}

    features = Features(value=Value("int64"), label=Value("int8"))
    return RowStream(IterableDataset.from_generator(rows, features=features))


def encoded(colour: int) -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (4, 4), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def keep(folder: Path, stream: RowStream, *, choice=None, identity=None, end_at: int | None = None) -> shards.Progress:
    def look(table, first):
        if end_at is not None and first >= end_at:
            raise Ended

    features = read_head(stream).features
    return shards.keep_rows(folder, stream, features, choice or shards.Everyone(), identity or {"run": 1}, look)


def values(folder: Path) -> list[int]:
    return shards.open_rows(folder)["value"][:]


def test_all_rows_are_kept_in_order(tmp_path):
    progress = keep(tmp_path / "kept", numbers())
    assert progress.complete and progress.seen == ROWS and len(progress.shards) == 3
    assert values(tmp_path / "kept") == list(range(ROWS))
    assert set(shards.open_rows(tmp_path / "kept").column_names) == {"value", "label"}


@pytest.mark.parametrize("end_at", [0, 200, 512, 700, 1299])
def test_a_pass_that_was_ended_goes_on_and_keeps_every_row_once(tmp_path, end_at):
    folder = tmp_path / "kept"
    with pytest.raises(Ended):
        keep(folder, numbers(), end_at=end_at // 64 * 64)
    assert not shards.Progress.read(folder).complete
    asked = []

    class Asked(shards.Everyone):
        def among(self, first, count):
            asked.append(first)
            return super().among(first, count)

    keep(folder, numbers(), choice=Asked())
    assert values(folder) == list(range(ROWS))
    assert min(asked) == end_at // SHARD * SHARD  # only the rows of the unfinished shard were asked about again


def test_a_half_written_shard_or_progress_is_as_if_it_were_not_there(tmp_path):
    folder = tmp_path / "kept"
    with pytest.raises(Ended):
        keep(folder, numbers(), end_at=960)
    (folder / "shard-00001.arrow.new").write_bytes(b"half")
    (folder / "shard-00001.arrow").write_bytes(b"half")  # whole, but the progress did not come to name it
    (folder / "progress.json.new").write_bytes(b"{")
    keep(folder, numbers())
    assert values(folder) == list(range(ROWS))


def test_a_stream_in_another_order_is_refused_when_the_pass_goes_on(tmp_path):
    with pytest.raises(Ended):
        keep(tmp_path / "kept", numbers(), end_at=640)
    with pytest.raises(DataRefused, match="other rows than before, from row 0"):
        keep(tmp_path / "kept", numbers(order=-1))


def test_a_stream_that_became_shorter_is_refused_when_the_pass_goes_on(tmp_path):
    with pytest.raises(Ended):
        keep(tmp_path / "kept", numbers(), end_at=640)
    with pytest.raises(DataRefused, match="other rows than before"):
        keep(tmp_path / "kept", numbers(300))


def test_what_was_kept_for_something_else_is_removed(tmp_path):
    keep(tmp_path / "kept", numbers(100), identity={"run": 1})
    keep(tmp_path / "kept", numbers(50), identity={"run": 2})
    assert values(tmp_path / "kept") == list(range(50))


def test_a_complete_pass_is_not_made_again(tmp_path):
    keep(tmp_path / "kept", numbers(100))
    assert keep(tmp_path / "kept", numbers(100), end_at=0).complete


def test_a_copied_folder_is_not_taken_up(tmp_path):
    """Its steps would share draws with those of the original, and be accounted as independent."""
    keep(tmp_path / "kept", numbers(100))
    shutil.copytree(tmp_path / "kept", tmp_path / "copy")
    assert shards.Progress.read(tmp_path / "kept") is not None
    assert shards.Progress.read(tmp_path / "copy") is None


def test_nobody_else_can_read_what_is_kept(tmp_path):
    keep(tmp_path / "kept", numbers(100))
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "kept").iterdir()} == {0o600}


def test_a_full_disk_ends_the_pass_and_says_that_nothing_is_lost(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_private_file", full)
    with pytest.raises(LoadingError, match="No space left.*stays there"):
        keep(tmp_path / "kept", numbers(100))


def test_images_are_kept_undecoded_and_read_back_by_the_transform(tmp_path):
    rows = Dataset.from_list(
        [{"image": {"bytes": encoded(i), "path": None}, "label": i % 3} for i in range(200)],
        features=Features(image=Image(), label=Value("int64")),
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    files = {"train": str(tmp_path / "rows.parquet")}
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True)
    images = image_stream(stream, Columns("image", "label"), lambda picture: picture.getpixel((0, 0))[0])
    keep(tmp_path / "kept", images)
    kept = shards.open_rows(tmp_path / "kept")
    assert kept.with_format("arrow")[:].column("image")[7].as_py()["bytes"] == encoded(7)
    assert [images.examples(kept)[i] for i in (0, 199)] == [
        {"pixel_values": 0, "labels": 0},
        {"pixel_values": 199, "labels": 1},
    ]


def test_files_of_this_machine_are_not_copied_and_a_missing_one_is_left_to_the_reader(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(encoded(5))
    patterns = {"train": str(tmp_path / "images" / "**")}
    stream = load_dataset("imagefolder", data_files=patterns, split="train", streaming=True)
    images = image_stream(stream, Columns("image", "label"), lambda picture: picture.size)
    keep(tmp_path / "kept", images)
    (tmp_path / "images" / "a" / "0.png").unlink()
    examples = images.examples(shards.open_rows(tmp_path / "kept"))
    assert examples[1] == {"pixel_values": (4, 4), "labels": 1}
    with pytest.raises(DataRefused, match="FileNotFoundError"):
        examples[0]


def test_an_undeclared_stream_is_typed_by_its_first_rows_and_arrays_come_back_as_tensors(tmp_path):
    def rows():
        for i in range(100):
            yield {"pixel_values": np.full((2, 3), i, np.float32), "labels": i}

    stream = as_stream(IterableDataset.from_generator(rows))
    keep(tmp_path / "kept", stream)
    example = stream.examples(shards.open_rows(tmp_path / "kept"))[42]
    assert example["pixel_values"].tolist() == [[42.0] * 3] * 2 and example["labels"] == 42


def test_a_column_without_a_type_and_an_empty_stream_are_refused():
    def untyped():
        for i in range(20):
            yield {"x": None, "labels": i}

    with pytest.raises(DataRefused, match="'x'.*declare it"):
        read_head(as_stream(IterableDataset.from_generator(untyped)))
    with pytest.raises(DataRefused, match="no row"):
        read_head(numbers(0))
