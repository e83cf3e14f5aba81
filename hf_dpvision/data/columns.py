"""Which column holds the picture, which one the class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from datasets import ClassLabel, Features, Image

from ..errors import DataRefused


IMAGE_NAMES = ("image", "img", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Columns:
    """Names of the two columns that training reads; every other column is ignored."""

    image: str
    label: str


def find_columns(features: Features, image: str | None = None, label: str | None = None) -> Columns:
    """Find the image and the label column.

    A name given by the caller wins. Otherwise the usual names are tried in order (`IMAGE_NAMES`, `LABEL_NAMES`),
    then the only column of type `Image`, or `ClassLabel`.

    Raises:
        DataRefused: a named column is absent, or nothing fits; the message lists the columns there are.
    """
    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    return Columns(
        image=_choose(features, "image_column_name", image, IMAGE_NAMES, pictures),
        label=_choose(features, "label_column_name", label, LABEL_NAMES, classes),
    )


def _choose(
    features: Features, argument: str, given: str | None, usual: Iterable[str], of_the_type: list[str]
) -> str:
    present = ", ".join(features) or "none"
    if given is not None:
        if given in features:
            return given
        raise DataRefused(f"{argument}={given!r} is not a column of the data set; columns present: {present}.")
    for name in usual:
        if name in features:
            return name
    if len(of_the_type) == 1:
        return of_the_type[0]
    raise DataRefused(
        f"no column named {', '.join(usual)} (columns present: {present}): name it with {argument}."
    )
