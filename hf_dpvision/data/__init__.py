"""Image data sets for private training: load, check, transform one example at a time."""

from .columns import Columns, find_columns
from .digits import load_digits
from .examples import ImageExamples, image_examples
from .loading import (
    DigitsData,
    FolderData,
    HubData,
    ImageData,
    ParquetData,
    Source,
    Split,
    StreamedData,
    load_image_data,
)
from .processors import ModelInput, model_input
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
    "FolderData",
    "HubData",
    "ImageData",
    "ImageExamples",
    "ImageStream",
    "ImageTransform",
    "ModelInput",
    "ParquetData",
    "Preprocessing",
    "Source",
    "Split",
    "StreamedData",
    "check_images",
    "check_labels",
    "declared_classes",
    "find_columns",
    "image_examples",
    "image_stream",
    "load_digits",
    "load_image_data",
    "model_input",
    "preprocessing_from_processor",
    "preprocessing_from_timm",
]
