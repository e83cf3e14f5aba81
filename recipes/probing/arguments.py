"""What the recipes that fit heads to features have in common: the images, their features, and how often is fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from hf_dpvision.config import argument
from hf_dpvision.data import ImageData, Split, load_image_data
from hf_dpvision.data.features import CachedFeatures
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.recipe.arguments import SOURCE_PATHS, SourceArguments, data_source

from .methods import Rows


PATHS = (*SOURCE_PATHS, "features_dir", "record")


@dataclass
class FeatureArguments(SourceArguments):
    """The images, their features, and the fits."""

    seed: int = argument(0, "Public: decides subsets, never the noise or the batches.")

    features_dir: str = argument("outputs/features", "Where features are kept, as private as the images.")
    keep_features: bool = argument(True, "Keep them for the next run; false deletes them at the end.")
    workers: int = argument(1, "Processes that decode images.")

    epsilons: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0], metadata={"help": "One fit each."})
    repeats: int = argument(3, "Private fits of each kind, each with new noise.")
    target_delta: float = argument(1e-5, "Delta, below 1 / number of training images.")
    record: str | None = argument(None, "File of JSON lines that gets a line with everything about this run.")

    def refuse_no_fit(self) -> None:
        """Refuse fits that cannot be made, before anything is computed.

        Raises:
            ArgumentRefused: there is none, or one at an epsilon without noise.
        """
        if self.repeats < 1 or not self.epsilons or not all(0 < epsilon < math.inf for epsilon in self.epsilons):
            raise ArgumentRefused(
                f"repeats={self.repeats}, epsilons={self.epsilons}: at least one fit is needed, and positive finite "
                "epsilons."
            )

    def images(self) -> ImageData:
        """Return the images that the arguments name."""
        split = Split(
            held_out_fraction=self.train_val_split, max_train=self.max_train_samples, max_eval=self.max_eval_samples,
            seed=self.seed,
        )  # fmt: skip
        return load_image_data(
            data_source(self), split, image_column=self.image_column_name, label_column=self.label_column_name
        )


def rows_of(cached: CachedFeatures, images: Dataset, data: ImageData) -> Rows:
    """Return the features of these images with their labels."""
    return Rows(cached.values, np.array(images[data.columns.label][:], np.int64), len(data.names))
