"""Which rows belong to one unit of privacy, and whether every row is there once: read from single columns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..errors import DataRefused
from .examples import ImageExamples
from .validation import column_values


@dataclass(frozen=True)
class Units:
    """The rows of every unit; units are numbered by their first row.

    Args:
        order: all row numbers, those of one unit adjacent and ascending, int64 `[rows]`.
        starts: where in `order` each unit begins, and the end of the last one, int64 `[units + 1]`.
    """

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows_of(self, unit: int) -> np.ndarray:
        """Return the row numbers of a unit, ascending, at least one."""
        return self.order[self.starts[unit] : self.starts[unit + 1]]


def group_rows(dataset: Any, column: str, argument: str = "privacy_unit_column") -> Units:
    """Group the rows that have the same value in `column`. One pass over that column; no picture is read.

    Args:
        dataset: a `datasets.Dataset`, or `ImageExamples` that kept the column.
        column: of whole numbers or text.
        argument: how the caller's user named the column.

    Raises:
        DataRefused: the data set has no such column, its values are of another type, or one is missing. Rows are
            named by their index; values are not shown.
    """
    codes = _codes(dataset, column, argument, "it is unknown with whose rows it is to be protected")
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes))]).astype(np.int64)
    return Units(np.argsort(codes, kind="stable").astype(np.int64), starts)


def refuse_repeated_ids(dataset: Any, column: str) -> None:
    """Raise if two rows have the same value in `column`: then one record is there several times.

    Raises:
        DataRefused: naming the first row that repeats an earlier one, and that one, by index; or as `group_rows`.
    """
    codes = _codes(dataset, column, "id_column", "it is unknown whether the record is there a second time")
    order = np.argsort(codes, kind="stable")
    repeats = np.flatnonzero(codes[order][1:] == codes[order][:-1])
    if len(repeats):
        first = repeats[np.argmin(order[repeats + 1])]
        raise DataRefused(
            f"id_column={column!r}: rows {order[first]} and {order[first + 1]} have the same value, and "
            f"{len(repeats)} rows in all repeat an earlier one. A record that is there several times is protected "
            "less than is claimed, since each of its rows is clipped and drawn by itself. Remove the copies, or set "
            f"privacy_unit_column={column!r}: then all rows of a record are protected together."
        )


def without_columns(dataset: Any, columns: Collection[str]) -> Any:
    """Return the data set as examples are read from it: without `columns`, unless a transform of its own decides."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return dataset
    return dataset.remove_columns([name for name in columns if name in dataset.column_names])


def _codes(dataset: Any, column: str, argument: str, why: str) -> np.ndarray:
    """Return a number for each row, equal for equal values, by first appearance, int32 `[rows]`."""
    values = column_values(_table_of(dataset, column, argument), column)
    missing = pc.index(pc.is_null(values), True).as_py()
    if missing >= 0:
        raise DataRefused(
            f"{argument}={column!r}: the value of row {missing} is missing (None), so {why}. Fill it in, or remove "
            "such rows."
        )
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataRefused(
            f"{argument}={column!r} is a column of type {kind}: whether two values are the same is certain for whole "
            "numbers and text only. Cast it to one of these."
        )
    encoded = values.dictionary_encode().unify_dictionaries()
    return np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])


def _table_of(dataset: Any, column: str, argument: str) -> Dataset:
    found = dataset.kept if isinstance(dataset, ImageExamples) else dataset
    if isinstance(dataset, ImageExamples) and (found is None or column not in found.column_names):
        raise DataRefused(
            f"{argument}={column!r}: these ImageExamples did not keep that column. Make them with "
            f"image_examples(..., keep=[{column!r}]); it is not read with the pictures."
        )
    if not isinstance(found, Dataset):
        raise DataRefused(
            f"{argument}={column!r}: train_dataset is a {type(found).__module__}.{type(found).__qualname__}, which "
            "has no columns, so it cannot be known which rows belong together. Pass a datasets.Dataset, or "
            "hf_dpvision.data.image_examples(..., keep=[...])."
        )
    if column not in found.column_names:
        raise DataRefused(
            f"{argument}={column!r} is not a column of the data set; columns present: "
            f"{', '.join(found.column_names) or 'none'}."
        )
    return found
