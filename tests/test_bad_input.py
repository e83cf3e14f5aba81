"""What users type or pass wrongly: refused before step 0 with nothing charged, warned of, or handled by a fixed rule.

The numbers are those of our list of bad inputs, 1 to 66. A number may have several rows, and none may be missing.

Long, because it is a table.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DynamoBackend
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_cases import Images, Linear, arguments, tiny_vit, trainer, weights
from transformers import EarlyStoppingCallback

from hf_dpvision import DPTrainer, DPTrainingArguments, accounting, guards
from hf_dpvision.config import parse_arguments
from hf_dpvision.data import Columns, check_images, check_labels, declared_classes
from hf_dpvision.data.columns import find_columns
from hf_dpvision.data.images import read_image, to_rgb
from hf_dpvision.errors import (
    ArgumentRefused,
    BudgetExceeded,
    CaptureError,
    DataRefused,
    LedgerRefused,
    ModelRefused,
)
from hf_dpvision.model_card import render_model_card


@dataclass(frozen=True)
class Refused:
    """`build` raises, or the trainer that it returns does when it trains; nothing is charged."""

    number: int
    what: str
    build: Callable[[Path], Any]
    words: str
    error: type[Exception] | tuple[type[Exception], ...] = ArgumentRefused
    environment: tuple[str, str] | None = None

    def check(self, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        if self.environment is not None:
            monkeypatch.setenv(*self.environment)
        run = None
        with pytest.raises(self.error) as refusal:
            run = self.build(folder)
            run.train()
        for word in self.words.split():
            assert word in str(refusal.value)
        assert run is None or (run.epsilon().upper, run.state.global_step) == (0, 0)


@dataclass(frozen=True)
class Warned:
    """The run is carried out, and a warning says what is odd."""

    number: int
    what: str
    build: Callable[[Path], DPTrainer]
    words: str

    def check(self, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="hf_dpvision.guards"):
            self.build(folder).train()
        for word in self.words.split():
            assert word in caplog.text


@dataclass(frozen=True)
class Handled:
    """Done by a fixed rule, which `shows` asserts."""

    number: int
    what: str
    shows: Callable[[Path], None]

    def check(self, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        self.shows(folder)


# Builders


def given(**changes: Any) -> Callable[[Path], DPTrainer]:
    """A trainer of the linear model with changed arguments."""
    return lambda folder: trainer(folder, Linear(), **changes)


def calibrated(**changes: Any) -> Callable[[Path], DPTrainer]:
    """The same with `target_epsilon` in place of `noise_multiplier`."""
    return given(noise_multiplier=None, **changes)


def after(**values: Any) -> Callable[[Path], DPTrainer]:
    """Arguments set afterwards, where their own machinery would fail on a machine without the library or device."""

    def build(folder: Path) -> DPTrainer:
        args = arguments(folder)
        for name, value in values.items():
            setattr(args, name, value)
        return DPTrainer(Linear(), args, train_dataset=Images())

    return build


def model(make: Callable[[], nn.Module], **changes: Any) -> Callable[[Path], DPTrainer]:
    """A trainer of this model, with the check on random inputs."""
    return lambda folder: trainer(folder, make(), self_check=True, **changes)


def data(make: Callable[[], Any], **changes: Any) -> Callable[[Path], DPTrainer]:
    """A trainer of a ViT with three classes on these data, with the check on random inputs."""
    return lambda folder: trainer(folder, tiny_vit(), train_dataset=make(), self_check=True, **changes)


def calling(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[Path], Any]:
    """No trainer: a function of the data path or of the guards."""
    return lambda folder: function(*args, **kwargs)


# Data


class Other(Images):
    """Pictures of another shape, or labels of another kind."""

    def __init__(self, shape: tuple[int, ...] = (3, 16, 16), label: Callable[[int], Any] = int) -> None:
        super().__init__()
        self.pixels = torch.randn(64, *shape)
        self.label = label

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": self.label(int(self.labels[index]))}


class Stream(torch.utils.data.IterableDataset):
    """Has no random access."""

    def __iter__(self):
        return iter(Images())


def rows(labels: list[Any], feature: Any = None, column: str = "label") -> Dataset:
    """A `datasets.Dataset` of small pictures as nested lists, in torch's format."""
    pixels = np.zeros((len(labels), 3, 16, 16), dtype=np.float32)
    made = Dataset.from_dict({"pixel_values": list(pixels), column: labels})
    return (made if feature is None else made.cast_column(column, feature)).with_format("torch")


def column(values: list[Any], **changes: Any) -> Callable[[Path], DPTrainer]:
    """A trainer on 64 rows with a column `scan`."""
    made = rows([0, 1] * 32).add_column("scan", values)
    return lambda folder: trainer(folder, Linear(), train_dataset=made, target_delta=1e-3, **changes)


def twice(batch: dict[str, list]) -> dict[str, list]:
    """A transform that makes two rows out of one."""
    return {"pixel_values": [torch.zeros(3, 16, 16)] * 2 * len(batch["label"]), "labels": batch["label"] * 2}


def stack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """The plainest collator."""
    return {
        "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
        "labels": torch.tensor([e["labels"] for e in examples]),
    }


def mixup(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Blends each picture with a random other one of the batch."""
    batch = stack(examples)
    share = torch.rand(())
    other = batch["pixel_values"][torch.randperm(len(examples))]
    return batch | {"pixel_values": share * batch["pixel_values"] + (1 - share) * other}


def keeps_paths(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Hands file names on."""
    return stack(examples) | {"path": ["private/name.png"] * len(examples)}


def stored(image: PILImage.Image, **options: Any) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def truncated() -> Dataset:
    """Four pictures, the third of which ends too early."""
    whole = stored(PILImage.new("L", (4, 4)))
    column = [{"bytes": whole[:40] if index == 2 else whole, "path": None} for index in range(4)]
    return Dataset.from_dict({"image": column}, features=Features({"image": Image()}))


# Models


class Normalising(Linear):
    """BatchNorm in front."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)


class Counting(Linear):
    """Keeps a running mean of its inputs in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * pixel_values.mean().detach()
        return super().forward(pixel_values)


class Mixing(Linear):
    """Subtracts the mean over the batch."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits = super().forward(pixel_values)
        return logits - logits.mean(0)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum(0)


class Escaping(Linear):
    """Uses a parameter in an operation of its own that nothing can look into."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return _Scaled.apply(super().forward(pixel_values), self.scale)


class Tied(Linear):
    """Uses its one layer twice."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values) + super().forward(pixel_values.flip(-1).square())


def hooked() -> nn.Module:
    """A model that another library watches."""
    found = Linear()
    found.head.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    return found


def hooked_parameter() -> nn.Module:
    """A model whose optimizer steps inside the backward pass."""
    found = Linear()
    found.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return found


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """One number for the whole batch."""
    return F.cross_entropy(outputs.logits, labels)


def accelerator(**found: Any) -> SimpleNamespace:
    """What the launcher made of its environment."""
    plugin = SimpleNamespace(backend=found.pop("backend", DynamoBackend.NO))
    plain = {"mixed_precision": "no", "distributed_type": DistributedType.NO}
    return SimpleNamespace(**plain | found, state=SimpleNamespace(dynamo_plugin=plugin))


# What the handled rows show


def a_stream_of_datasets_is_drawn_like_its_rows_by_index(folder: Path) -> None:
    found = []
    for number, dataset in enumerate((rows([0, 1] * 32), rows([0, 1] * 32).to_iterable_dataset())):
        run = trainer(folder / str(number), tiny_vit(), train_dataset=dataset)
        run.train()
        found.append(weights(run.model))
    assert torch.equal(*found)


def full_batch_uses_the_closed_form(folder: Path) -> None:
    run = trainer(folder, Linear(), logical_batch_size=64, accountant="prv")
    run.train()
    assert run.epsilon().accountant == "gaussian"
    assert run.epsilon() == accounting.epsilon(sample_rate=1.0, noise_multiplier=1.0, steps=4, delta=1e-4)


def the_step_after_the_last_is_refused(folder: Path) -> None:
    run = trainer(folder, Linear())
    run.train()
    spent, before = run.epsilon(), weights(run.model)
    with pytest.raises(BudgetExceeded, match="4 planned steps"):
        run.training_step(run.model, iter(()))
    assert run.epsilon() == spent and torch.equal(before, weights(run.model))


def a_wrong_label_met_in_training_contributes_nothing(folder: Path) -> None:
    results = []
    for wrong in (-1, 99):
        chosen = Images()
        chosen.labels[:32] = wrong
        torch.manual_seed(0)
        run = trainer(folder / str(wrong), Linear(), train_dataset=chosen)
        run.train()
        results.append(weights(run.model))
    assert torch.equal(*results)


class _Unreadable(Images):
    """Half of the examples fail when they are read, once training has begun."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        super().__init__()
        self.fail = fail

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | ({"labels": self.fail()} if index % 2 else {})


def _contributes_nothing(fail: Callable[[], Any]) -> Callable[[Path], None]:
    """What fails has the effect of a label that is none of the classes, which has no gradient."""

    def shows(folder: Path) -> None:
        results = []
        for name, failing in (("fails", fail), ("none of the classes", lambda: -1)):
            torch.manual_seed(0)
            run = trainer(folder / name, Linear(), train_dataset=_Unreadable(failing))
            run.train()
            results.append(weights(run.model))
        assert (results[0] - results[1]).abs().max() < 1e-6

    return shows


def nothing_random_is_saved_with_a_model(folder: Path) -> None:
    run = trainer(folder / "run", Linear(), save_strategy="steps", save_steps=2)
    keys = []
    draw = run._run.next_sampling_key
    run._run.next_sampling_key = lambda: keys.append(draw()) or keys[-1]
    run.train()
    run.save_model(str(folder / "model"))
    run.create_model_card()
    names = {path.name for path in (folder / "model").iterdir()}
    assert names == {"model.safetensors", "training_args.bin", "privacy.json"}
    states = [run._run._noise(step)._generator.get_state().numpy().tobytes()[1000:1064] for step in range(1, 5)]
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [secret for secret in (*keys, *states) if secret in content]
        assert not [key for key in keys if key.hex().encode() in content]


def a_card_says_all_of_it(folder: Path) -> None:
    run = trainer(folder, Linear(), seed=None)
    run.train()
    text = render_model_card(run.privacy_statement(), model_name="tiny")
    for words in ("zero-out", "delta", "training examples N | 64", "rdp", "dp-sgd", "unit of privacy | one example"):
        assert words in text


def _card_without(*names: str) -> Callable[[Path], None]:
    """A card of a statement that lacks one entry."""

    def build(folder: Path) -> None:
        run = trainer(folder, Linear(), seed=None)
        run.train()
        statement = run.privacy_statement()
        inner = statement
        for name in names[:-1]:
            inner = inner[name]
        del inner[names[-1]]
        render_model_card(statement, model_name="tiny")

    return build


def _taken_up_with(folder: Path, **changes: Any) -> None:
    """A run of one step is taken up with other arguments."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(folder, Linear(), max_steps=1, **saving).train()
    trainer(folder, Linear(), **saving | changes).train(resume_from_checkpoint=True)


def _in_the_folder_of_another(folder: Path) -> DPTrainer:
    trainer(folder, Linear(), max_steps=1).train()
    return trainer(folder, Linear())


def every_mode_becomes_rgb(folder: Path) -> None:
    colour = PILImage.new("RGB", (3, 2), (10, 200, 30))
    for mode in ("1", "L", "P", "RGBA", "CMYK", "LA", "PA", "I", "I;16"):
        image = colour.convert("L").convert(mode) if mode in ("LA", "I", "I;16") else colour.convert(mode)
        assert np.array_equal(to_rgb(image), to_rgb(image.copy())) and to_rgb(image).mode == "RGB"


def a_turned_picture_is_put_upright(folder: Path) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    assert read_image(stored(PILImage.new("RGB", (3, 2)), exif=exif), 0).size == (2, 3)


def an_animation_gives_its_first_frame(folder: Path) -> None:
    frames = [PILImage.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    assert read_image(stored(frames[0], save_all=True, append_images=frames[1:]), 0).getpixel((0, 0)) == (255, 0, 0)


def copies_of_a_record_are_clipped_together(folder: Path) -> None:
    made = rows([0, 1] * 32).add_column("scan", [row // 2 for row in range(64)])
    run = trainer(folder, Linear(), train_dataset=made, privacy_unit_column="scan", target_delta=1e-3, seed=None)
    run.train()
    assert run.privacy_statement()["sampling"]["dataset_size"] == 32


def not_finite_pixels_contribute_nothing(folder: Path) -> None:
    chosen = Images()
    chosen.pixels[::2], chosen.pixels[1::8] = float("nan"), float("inf")
    run = trainer(folder, tiny_vit(), train_dataset=chosen)
    run.train()
    assert torch.isfinite(weights(run.model)).all()


def both_orders_of_channels_are_read(folder: Path) -> None:
    array = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(read_image(array, 0), read_image(np.moveaxis(array, -1, 0), 0))


def a_layer_used_twice_is_clipped_exactly(folder: Path) -> None:
    run = trainer(folder, Tied(), self_check=True)
    run.train()
    assert run.state.global_step == 4


def half_precision_weights_are_trained_in_full(folder: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert weights(trainer(folder, Linear().to(dtype)).model).dtype == torch.float32


def the_gradient_with_noise_is_not_clipped_again(folder: Path) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(DPTrainingArguments)}
    assert fields["max_grad_norm"] == 0 == arguments(folder).max_grad_norm


def the_training_loss_is_not_computed(folder: Path) -> None:
    run = trainer(folder, Linear(), logging_steps=1)
    assert math.isnan(run.train().training_loss)
    assert not {"loss", "train_loss"} & {name for logs in run.state.log_history for name in logs}


def the_published_seed_decides_no_noise(folder: Path) -> None:
    results = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        run = trainer(folder / name, Linear(), seed=None, logical_batch_size=64, full_determinism=True)
        run.train()
        results.append(weights(run.model))
    assert (results[0] != results[1]).all()


def a_transform_sees_one_example_at_a_time(folder: Path) -> None:
    sizes = []

    def centred(batch: dict[str, list]) -> dict[str, list]:
        pixels = torch.stack([torch.as_tensor(value) for value in batch["pixel_values"]])
        sizes.append(len(pixels))
        return {"pixel_values": list(pixels - pixels.mean(0)), "labels": batch["label"]}

    trainer(folder, Linear(), train_dataset=rows([0, 1] * 60).with_transform(centred)).train()
    assert len(sizes) > 10 and set(sizes) == {1}


def paths_reach_no_log(folder: Path) -> None:
    named = rows([0, 1] * 60).add_column("path", ["private/name.png"] * 120)
    run = trainer(folder, Linear(), train_dataset=named, logging_steps=1, save_strategy="steps", save_steps=4)
    run.train()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"private/name" in path.read_bytes()]


def the_command_line_names_the_closest_argument(folder: Path) -> None:
    with pytest.raises(ArgumentRefused, match="target_epsilom.*target_epsilon"):
        parse_arguments([DPTrainingArguments], ["--target_epsilom", "3"])


BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
METRIC = {"eval_strategy": "steps", "eval_steps": 2}
NAN, INF = float("nan"), float("inf")
REFUSED_MODEL = (ModelRefused, CaptureError)

BUDGET = [
    *(Refused(1, f"epsilon {e}", calibrated(target_epsilon=e), f"target_epsilon={e} positive finite")
      for e in (0.0, -1.0, NAN, INF)),
    Refused(2, "sigma and epsilon", given(target_epsilon=3.0), "target_epsilon noise_multiplier exactly one"),
    Refused(2, "neither", calibrated(), "target_epsilon noise_multiplier exactly one"),
    *(Refused(3, f"delta {d}", given(target_delta=d), f"target_delta={d} 1 / number") for d in (0.0, 1.0, 0.5, NAN)),
    Refused(3, "delta above 1/N", given(target_delta=0.05), "target_delta=0.05 publishing one whole example"),
    Refused(4, "tiny delta", given(target_delta=1e-13), "target_delta=1e-13 [1e-12"),
    *(Refused(5, f"sigma {s}", given(noise_multiplier=s), f"noise_multiplier={s} disable_dp")
      for s in (0.0, -0.5, NAN, INF)),
    Warned(6, "little noise", given(noise_multiplier=0.25), "noise_multiplier=0.25 little protection"),
    Warned(6, "large epsilon", calibrated(target_epsilon=25.0), "target_epsilon=25 little protection"),
    Refused(7, "batch above N", given(logical_batch_size=65), "logical_batch_size=65 64 examples exceed 1"),
    Refused(7, "no batch", given(logical_batch_size=0), "logical_batch_size=0"),
    Handled(8, "full batch", full_batch_uses_the_closed_form),
    Refused(9, "unreachable", calibrated(target_epsilon=1e-9, target_delta=1e-12, max_steps=1000),
            "target_epsilon=1e-09 cannot be reached steps=1000 fewer"),
    Refused(10, "no steps", given(max_steps=0), "max_steps=0 no step"),
    Refused(10, "half a step", given(max_steps=2.5), "max_steps=2.5 whole"),
    Refused(10, "no epochs", given(max_steps=-1, num_train_epochs=0), "num_train_epochs=0 no step"),
    Refused(10, "epochs NaN", given(max_steps=-1, num_train_epochs=NAN), "num_train_epochs=nan finite max_steps"),
    Refused(10, "endless", given(max_steps=-1, num_train_epochs=INF), "num_train_epochs=inf finite max_steps"),
    *(Refused(11, f"C {c}", given(per_sample_max_grad_norm=c), f"max_norm={c} positive finite")
      for c in (0.0, -1.0, NAN, INF)),
    Refused(12, "no such argument", given(eps_error=0.5), "eps_error", TypeError),
    Handled(13, "step T + 1", the_step_after_the_last_is_refused),
    *(Refused(14, name, lambda folder, change={name: value}: _taken_up_with(folder, **change), f"{name} now before")
      for name, value in {"noise_multiplier": 2.0, "logical_batch_size": 16, "per_sample_max_grad_norm": 0.5,
                          "target_delta": 1e-5}.items()),
    Refused(14, "data", lambda folder: _taken_up_with(folder, train_dataset=Images(65)), "dataset_size: 65 now, 64"),
]  # fmt: skip

DATA = [
    Refused(15, "empty", given(train_dataset=Images(0)), "train_dataset is empty", DataRefused),
    Refused(15, "none", given(train_dataset=None), "train_dataset is None", DataRefused),
    Warned(16, "few examples", given(), "64 examples"),
    Warned(16, "large share", given(logical_batch_size=40), "logical_batch_size=40 more than half"),
    Refused(17, "no label column", calling(find_columns, Features({"image": Image(), "kind": Value("string")})),
            "label image, kind label_column_name", DataRefused),
    Refused(17, "no labels", data(lambda: rows([0] * 64, column="kind")), "no 'labels'", DataRefused),
    Refused(18, "missing", data(lambda: rows([0, 1, None] * 30)), "example 2 missing", DataRefused),
    Refused(18, "negative", data(lambda: rows([0, -1] * 40)), "example 1 -1 negative", DataRefused),
    Refused(18, "too large", data(lambda: rows([0, 1, 2, 3] * 20)), "example 3 outside the 3 classes", DataRefused),
    Refused(18, "NaN", calling(check_labels, rows([0.0, NAN]), "label", ["a", "b"]),
            "double a class is a whole number", DataRefused),
    Handled(18, "at run time", a_wrong_label_met_in_training_contributes_nothing),
    Handled(18, "None at run time", _contributes_nothing(lambda: None)),
    Refused(19, "text", calling(declared_classes, rows(["cat", "dog"]), "label"), "class_names", DataRefused),
    Refused(19, "text in the trainer", data(lambda: rows(["cat", "dog"] * 40)),
            "collator 'label': 'str' whole number", DataRefused),
    Refused(20, "inferred", calling(declared_classes, rows([0, 1]), "label"), "not inferred private", DataRefused),
    Refused(21, "float labels", data(lambda: Other(label=float)), "float32 3 outputs whole number", DataRefused),
    Refused(21, "float column", calling(check_labels, rows([0.0, 1.0]), "label", ["a", "b"]), "whole", DataRefused),
    Refused(22, "several labels", data(lambda: Other(label=lambda one: [one, one])),
            "(2, 2) one whole number problem_type", DataRefused),
    Handled(23, "modes", every_mode_becomes_rgb),
    Refused(23, "float mode", calling(read_image, PILImage.new("F", (2, 2)), 7), "example 7 mode 'F'", DataRefused),
    Handled(24, "EXIF", a_turned_picture_is_put_upright),
    Refused(25, "truncated", calling(check_images, truncated(), Columns("image", "label")),
            "example 2 repair", DataRefused),
    Handled(25, "at run time", _contributes_nothing(lambda: read_image(stored(PILImage.new("L", (9, 9)))[:40], 1))),
    Handled(26, "at run time", _contributes_nothing(lambda: _bomb(Path()))),
    Refused(27, "no pixels", calling(read_image, np.zeros((0, 4, 3), np.uint8), 5), "example 5 repair", DataRefused),
    Handled(27, "animation", an_animation_gives_its_first_frame),
    Refused(28, "float array", calling(read_image, np.full((2, 2), NAN), 3), "example 3 whole 0..255", DataRefused),
    Refused(28, "range", calling(read_image, np.full((2, 2), 300), 3), "example 3 0..255 300", DataRefused),
    Handled(28, "NaN tensors", not_finite_pixels_contribute_nothing),
    Refused(29, "channels last", data(lambda: Other((16, 16, 3))), "pixel_values [16, 16, 3] channels", DataRefused),
    Handled(29, "arrays", both_orders_of_channels_are_read),
    Refused(30, "other size", data(lambda: Other((3, 24, 24))), "pixel_values [3, 24, 24] size", DataRefused),
    Refused(31, "two rows from one", data(lambda: rows([0, 1] * 40).with_transform(twice)),
            "2 examples transform map", DataRefused),
    Refused(32, "an id twice", column([*map(str, range(60)), "A", "B", "A", "B"], id_column="scan"),
            "id_column='scan' rows 60 and 62 2 rows in all several times privacy_unit_column='scan'", DataRefused),
    Refused(32, "an id missing", column([*range(63), None], id_column="scan"),
            "id_column row 63 missing", DataRefused),
    Refused(32, "no such ids", given(id_column="scan"), "id_column Images no columns datasets.Dataset", DataRefused),
    Handled(32, "copies under one unit", copies_of_a_record_are_clipped_together),
    Refused(33, "a unit missing", column([1, 2, None, 4] * 16, privacy_unit_column="scan"),
            "privacy_unit_column='scan' row 2 missing whose rows", DataRefused),
    Refused(33, "a unit missing as text", column(["a", None] * 32, privacy_unit_column="scan"),
            "privacy_unit_column row 1 missing remove", DataRefused),
    Refused(33, "units as floats", column([1.0, NAN] * 32, privacy_unit_column="scan"), "double whole", DataRefused),
    Refused(33, "no such column", column(list(range(64)), privacy_unit_column="patient"),
            "privacy_unit_column='patient' columns present: pixel_values, label, scan", DataRefused),
    Refused(33, "more than there are units", column([0, 1] * 32, privacy_unit_column="scan"),
            "logical_batch_size=8 2 units exceed 1"),
    Refused(33, "no column named", given(privacy_unit="unit"), "privacy_unit='unit' privacy_unit_column"),
    Refused(34, "stream", given(train_dataset=Stream()), "stream Poisson from_generator", DataRefused),
    Handled(34, "datasets stream", a_stream_of_datasets_is_drawn_like_its_rows_by_index),
    Refused(35, "grouped", given(train_sampling_strategy="group_by_length"), "train_sampling_strategy Poisson"),
    Refused(35, "drop last", given(dataloader_drop_last=True), "dataloader_drop_last=True independent"),
    Refused(35, "own sampler",
            lambda folder: trainer(folder, Linear(), train_dataset=torch.utils.data.DataLoader(
                Images(), sampler=torch.utils.data.WeightedRandomSampler([1.0] * 64, 64))),
            "DataLoader sampler Poisson dataset", DataRefused),
    Refused(36, "evaluated on itself", lambda folder: _evaluated_on_itself(folder, Images()), "eval_dataset held-out"),
    Refused(36, "same rows", lambda folder: _evaluated_on_itself(folder, rows([0, 1] * 60)), "eval_dataset held-out"),
]  # fmt: skip


def _evaluated_on_itself(folder: Path, train: Any) -> DPTrainer:
    same = train.with_format("numpy").with_format("torch") if isinstance(train, Dataset) else train
    return trainer(folder, Linear(), train_dataset=train, eval_dataset={"test": same}, **METRIC)


def _turned_into(folder: Path, dtype: torch.dtype) -> DPTrainer:
    run = trainer(folder, Linear())
    for parameter in run.model.parameters():
        parameter.data = parameter.data.to(dtype)
    return run


MODEL = [
    Refused(37, "BatchNorm", model(Normalising), "Layer 'norm' BatchNorm2d replace_batchnorm", ModelRefused),
    Refused(38, "buffer", model(Counting), "buffer mean", ModelRefused),
    Refused(39, "out of sight", model(Escaping), "scale", REFUSED_MODEL),
    Refused(40, "mixing", model(Mixing), "examples", ModelRefused),
    Handled(41, "used twice", a_layer_used_twice_is_clipped_exactly),
    Refused(42, "frozen", model(lambda: Linear().requires_grad_(False)), "no trainable requires_grad_", ModelRefused),
    Handled(43, "loaded in half precision", half_precision_weights_are_trained_in_full),
    *(Refused(43, str(dtype), lambda folder, dtype=dtype: _turned_into(folder, dtype),
              f"'head.weight' {dtype} float()", ModelRefused)
      for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn)),
    Refused(44, "DataParallel", model(lambda: nn.DataParallel(Linear())), "DataParallel inside", ModelRefused),
    Refused(44, "compiled", model(lambda: torch.compile(Linear())), "OptimizedModule inside", ModelRefused),
    Refused(45, "mean loss", data(Images, compute_loss_func=mean_loss), "compute_loss_func () per example"),
    Refused(46, "five classes, three outputs",
            data(lambda: rows([0, 1, 2] * 30, ClassLabel(names=list("abcde")))),
            "'label' 5 classes 3 outputs num_labels=5", DataRefused),
    Refused(47, "module hook", model(hooked), "module 'head' backward hooks", ModelRefused),
    Refused(47, "parameter hook", model(hooked_parameter), "parameter 'head.weight' hooks", ModelRefused),
    Refused(48, "meta", model(lambda: Linear().to("meta")), "'head.weight' meta device Load", ModelRefused),
]  # fmt: skip

ARGUMENTS = [
    Refused(49, "fp16", after(fp16=True), "fp16=True bf16"),
    Refused(49, "launcher fp16", given(), "mixed_precision='fp16' launcher bf16",
            environment=("ACCELERATE_MIXED_PRECISION", "fp16")),
    Refused(49, "launcher fp8", calling(guards.refuse_accelerator, accelerator(mixed_precision="fp8")), "fp8 bf16"),
    Refused(49, "launcher dynamo", given(), "dynamo_backend launcher --dynamo_backend no",
            environment=("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")),
    Refused(49, "compiled", given(torch_compile=True), "torch_compile=True off"),
    Refused(50, "batch finder", after(auto_find_batch_size=True), "auto_find_batch_size restart uncounted"),
    Refused(51, "best model", given(load_best_model_at_end=True, eval_dataset=Images(8), **BEST),
            "load_best_model_at_end public"),
    Refused(51, "save best", given(save_strategy="best", metric_for_best_model="loss"), "save_strategy public"),
    *(Refused(51, name, given(lr_scheduler_type=name, eval_dataset=Images(8), **METRIC), "lr_scheduler_type public")
      for name in ("reduce_lr_on_plateau", "greedy")),
    Refused(51, "early stopping", given(callbacks=[EarlyStoppingCallback(1)]), "EarlyStoppingCallback public"),
    Handled(52, "default", the_gradient_with_noise_is_not_clipped_again),
    Refused(52, "set by the user", given(max_grad_norm=1.0), "max_grad_norm=1.0 per_sample_max_grad_norm"),
    Refused(53, "accumulation", given(gradient_accumulation_steps=2),
            "gradient_accumulation_steps=2 logical_batch_size per_device_train_batch_size"),
    Refused(54, "NEFTune", given(neftune_noise_alpha=1.0), "neftune_noise_alpha=1.0"),
    Refused(54, "label names", given(label_names=["labels", "more"]), "label_names exactly one"),
    Refused(54, "mixup", given(data_collator=mixup), "collator mixes 'pixel_values'", DataRefused),
    Handled(54, "transform that mixes", a_transform_sees_one_example_at_a_time),
    *(Refused(55, name, given(optim=name), "optim inside the backward pass")
      for name in ("lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise")),
    Refused(56, "L-BFGS", lambda folder: _with_optimizer(folder), "LBFGS several times SGD"),
    Refused(56, "L-BFGS by class",
            lambda folder: DPTrainer(Linear(), arguments(folder), train_dataset=Images(),
                                     optimizer_cls_and_kwargs=(torch.optim.LBFGS, {})), "LBFGS several times SGD"),
    *(Refused(57, name, after(**{name: value}), f"{name} sharded one process per device")
      for name, value in {"deepspeed": {"a": 1}, "parallelism_config": object()}.items()),
    Refused(57, "fsdp alone", after(fsdp=True), "fsdp=True one process torchrun"),
    *(Refused(57, kind.value, calling(guards.refuse_accelerator, accelerator(distributed_type=kind)),
              f"distributed_type='{kind.value}' sharded")
      for kind in (DistributedType.XLA, DistributedType.FSDP, DistributedType.MEGATRON_LM)),
    Handled(58, "training loss", the_training_loss_is_not_computed),
    Refused(59, "all checkpoints", given(push_to_hub=True, hub_strategy="all_checkpoints"), "hub_strategy every_save"),
    Refused(59, "checkpoint in a step", given(enable_jit_checkpoint=True), "enable_jit_checkpoint SIGTERM 143"),
    Handled(60, "seed", the_published_seed_decides_no_noise),
    Refused(60, "noise seed", given(noise_seed=1), "noise_seed", TypeError),
    Refused(61, "search", lambda folder: trainer(folder, Linear()).hyperparameter_search(),
            "hyperparameter_search trial public"),
    Handled(63, "paths", paths_reach_no_log),
    Refused(62, "another run's folder", _in_the_folder_of_another, "ledger 1 steps another output_dir", LedgerRefused),
    Refused(63, "collated paths", given(data_collator=keeps_paths), "list 'path' Drop", DataRefused),
    Refused(64, "typo", given(max_grad_nrom=0.1), "max_grad_nrom", TypeError),
    Handled(64, "typo on the command line", the_command_line_names_the_closest_argument),
    Handled(65, "states and keys", nothing_random_is_saved_with_a_model),
    Handled(66, "whole card", a_card_says_all_of_it),
    *(Refused(66, " ".join(names), _card_without(*names), f"statement lacks '{names[-1]}'")
      for names in (["neighboring_relation"], ["unit_of_privacy"], ["guarantee", "delta"], ["mechanism"], ["claim"],
                    ["sampling", "dataset_size"], ["accountant", "name"])),
]  # fmt: skip


def _with_optimizer(folder: Path) -> DPTrainer:
    chosen = Linear()
    return trainer(folder, chosen, optimizers=(torch.optim.LBFGS(chosen.parameters()), None))


def _bomb(folder: Path) -> None:
    limit, PILImage.MAX_IMAGE_PIXELS = PILImage.MAX_IMAGE_PIXELS, 100
    try:
        read_image(stored(PILImage.new("L", (15, 15))), 4)
    finally:
        PILImage.MAX_IMAGE_PIXELS = limit


ROWS = [*BUDGET, *DATA, Refused(26, "too many pixels", _bomb, "example 4 exceeds", DataRefused), *MODEL, *ARGUMENTS]


@pytest.fixture(autouse=True)
def clean_accelerator():
    """What one test's environment switched on must not stay in accelerate's shared state."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.number}-{type(row).__name__.lower()}-{row.what}")
def test_bad_input_is_refused_warned_of_or_handled(row, tmp_path, monkeypatch, caplog):
    row.check(tmp_path, monkeypatch, caplog)


def test_every_number_of_the_list_is_tested():
    assert {row.number for row in ROWS} == set(range(1, 67))
