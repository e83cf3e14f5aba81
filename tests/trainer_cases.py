"""A tiny data set, tiny models and short runs for the tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification

from hf_dpvision import DPTrainer, DPTrainingArguments
from hf_dpvision.mechanism import FixedRandomness


CLASSES = 3


class Images(Dataset):
    """Random pictures `[3, 16, 16]` with random labels; what is asked for is written down in `seen`."""

    def __init__(self, size: int = 64, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(size)
        self.pixels = torch.randn(size, 3, 16, 16, generator=generator).to(dtype)
        self.labels = torch.randint(CLASSES, (size,), generator=generator)
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.seen.append(index)
        return {"pixel_values": self.pixels[index], "labels": int(self.labels[index])}

    def batch(self, indices: Any) -> dict[str, Tensor]:
        """The examples of these indices, collated."""
        return {"pixel_values": self.pixels[indices], "labels": self.labels[indices]}


class Linear(nn.Module):
    """The simplest model: one linear layer on the pixels; its forward takes the inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(pixel_values.flatten(1))


def tiny_vit(dropout: float = 0.0) -> ViTForImageClassification:
    """A ViT of two blocks, the same weights at every call."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
    )
    return ViTForImageClassification(config)


def arguments(folder: Path, **changes: Any) -> DPTrainingArguments:
    """Four quiet steps of expected batch 8 with fixed noise, changed as told."""
    settings = {
        "output_dir": str(folder),
        "noise_multiplier": 1.0,
        "target_delta": 1e-4,
        "logical_batch_size": 8,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "self_check": False,
        "accountant": "rdp",
        "run_report": False,
    }
    return DPTrainingArguments(**settings | changes)


def trainer(folder: Path, model: nn.Module | None = None, *, seed: int | None = 0, **changes: Any) -> DPTrainer:
    """A trainer with repeatable draws and noise, or with real ones if `seed` is None.

    `changes` named like arguments of `DPTrainer` go there, the others into its training arguments.
    """
    own = {
        name: changes.pop(name)
        for name in ("train_dataset", "eval_dataset", "callbacks", "compute_loss_func", "data_collator", "optimizers")
        if name in changes
    }
    own.setdefault("train_dataset", Images())
    randomness = changes.pop("randomness", None if seed is None else FixedRandomness(seed))
    model = tiny_vit() if model is None else model
    return DPTrainer(model=model, args=arguments(folder, **changes), randomness=randomness, **own)


def weights(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


class Pictures:
    """A transform of rows with `pixels` and `class`; the rows read are noted in `seen`.

    Args:
        dtype: of the pictures.
        turning: every other time a row is read, its picture is upside down.
        broken: rows that cannot be read.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float32, turning: bool = False, broken: tuple[int, ...] = ()
    ) -> None:
        self.dtype, self.turning, self.broken = dtype, turning, broken
        self.seen: list[int] = []

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        (row,) = batch["row"]
        self.seen.append(row)
        if row in self.broken:
            raise ValueError(f"row {row} cannot be read")
        picture = torch.tensor(batch["pixels"][0], dtype=self.dtype).view(3, 16, 16)
        turned = self.turning and self.seen.count(row) % 2 == 0
        return {"pixel_values": [picture.flip(1) if turned else picture], "labels": batch["class"]}


def visits(sizes: tuple[int, ...], names: str = "p{}") -> datasets.Dataset:
    """Rows of patients who were there so often, in mixed order; column `patient` says whose they are."""
    generator = torch.Generator().manual_seed(sum(sizes))
    owners = torch.tensor([owner for owner, size in enumerate(sizes) for _ in range(size)])
    owners = owners[torch.randperm(len(owners), generator=generator)].tolist()
    columns = {
        "row": list(range(len(owners))),
        "patient": [names.format(owner) if names else owner for owner in owners],
        "pixels": torch.randn(len(owners), 3 * 16 * 16, generator=generator, dtype=torch.float64).numpy(),
        "class": torch.randint(CLASSES, (len(owners),), generator=generator).tolist(),
    }
    return datasets.Dataset.from_dict(columns)
