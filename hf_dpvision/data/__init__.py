"""Image data sets for private training: load, check, transform one example at a time."""

from .columns import Columns, find_columns
from .digits import load_digits
from .examples import ImageExamples, image_examples
from .loading import ImageData, Split, load_image_data, load_image_stream
from .processors import ModelInput, model_input
from .sources import DigitsData, FilesData, FolderData, HubData, Source
from .streams import ImageStream, image_stream
from .transforms import (
    Augmentation,
    ImageTransform,
    Preprocessing,
    preprocessing_from_processor,
    preprocessing_from_timm,
)
from .validation import check_images, check_labels, declared_classes


__all__ = [
    "Augmentation",
    "Columns",
    "DigitsData",
    "FilesData",
    "FolderData",
    "HubData",
    "ImageData",
    "ImageExamples",
    "ImageStream",
    "ImageTransform",
    "ModelInput",
    "Preprocessing",
    "Source",
    "Split",
    "check_images",
    "check_labels",
    "declared_classes",
    "find_columns",
    "image_examples",
    "image_stream",
    "load_digits",
    "load_image_data",
    "load_image_stream",
    "model_input",
    "preprocessing_from_processor",
    "preprocessing_from_timm",
]
