"""Fine-tune Hugging Face and timm vision models with differential privacy.

The public names, loaded when first used so that the accounting commands start without torch models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from . import accounting, clipping
    from .dpsgd import ClippedGradient, clipped_gradient, per_example_norms
    from .models import load_model
    from .trainer import DPTrainer
    from .training_args import DPTrainingArguments

__version__ = "0.1.0"

_HOMES = {
    "ClippedGradient": "dpsgd",
    "DPTrainer": "trainer",
    "DPTrainingArguments": "training_args",
    "accounting": None,
    "clipped_gradient": "dpsgd",
    "clipping": None,
    "load_model": "models",
    "per_example_norms": "dpsgd",
}

__all__ = [
    "ClippedGradient",
    "DPTrainer",
    "DPTrainingArguments",
    "accounting",
    "clipped_gradient",
    "clipping",
    "load_model",
    "per_example_norms",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_dpvision' has no attribute {name!r}; it offers {__all__}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f".{name}", __name__)
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
