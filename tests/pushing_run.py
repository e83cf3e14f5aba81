"""A process that trains with planted secrets and pushes to the Hub named by its environment, or loads back from it.

The client reads the Hub's address when it is imported, hence a process of its own. Its user writes `push_to_hub=True`.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from trainer_cases import Images, arguments, tiny_vit
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainerCallback,
    ViTImageProcessor,
    pipeline,
)

from hf_dpvision import DPTrainer, mechanism


PATTERN = np.random.default_rng(7).integers(0, 256, 48, dtype=np.uint8)  # stands in every training picture
PIXELS = (PATTERN / 255).astype(np.float32)
LEAKS = (
    "rng_state.pth", "predictions.csv", "notes.txt", "gradients.safetensors", "runs/events.out.tfevents.1.x.0",
    "adapter_model.safetensors", "model-00001-of-00002.safetensors", "other/model.safetensors",
)  # fmt: skip


class Planted(Images):
    """Pictures `[3, size, size]` of the pattern, repeated, in another strength for each of them."""

    def __init__(self, size: int = 16, number: int = 32) -> None:
        super().__init__(number)
        tiled = torch.from_numpy(np.resize(PIXELS, 3 * size * size)).reshape(3, size, size)
        self.pixels = tiled.repeat(number, 1, 1, 1)
        self.pixels[1:, 0, 0] += torch.linspace(0, 1, number - 1)[:, None]


class States(TrainerCallback):
    """Writes down the states of the random number generators whenever a checkpoint could have them."""

    def __init__(self, found: list[list[str]]) -> None:
        self.found = found

    def on_train_begin(self, args, state, control, **kwargs):
        self.look()

    def on_save(self, args, state, control, **kwargs):
        self.look()

    def on_train_end(self, args, state, control, **kwargs):
        self.look()

    def look(self) -> None:
        """Keep a part of each state."""
        python = np.array(random.getstate()[1][:-1], dtype=np.uint32)
        numpy, torchs = np.random.get_state()[1].astype(np.uint32), torch.get_rng_state().numpy()
        self.found.append([part.tobytes()[24:152].hex() for part in (python, numpy, torchs)])


class Probed(DPTrainer):
    """Sees the true losses of the private examples, which no trainer writes down."""

    losses: list[list[float]]  # by step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.losses.append([])
        return super().training_step(model, inputs, num_items_in_batch)

    def per_sample_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        losses = super().per_sample_loss(model, inputs)
        if self.losses and model.training:
            self.losses[-1] += losses.detach().tolist()
        return losses


def plant(folder: Path, token: str) -> None:
    """Put files that must not leave, and that no trainer wrote, into an output folder."""
    for name in LEAKS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(token.encode() + PATTERN.tobytes() + PIXELS.tobytes() + b'{"train_loss": 1.5}')


def run(folder: Path, model: nn.Module, size: int, told: dict[str, Any], **settings: Any) -> DPTrainer:
    """Train one model; `told` gets what must not be found on the Hub."""
    states: list[list[str]] = []
    processor = ViTImageProcessor(size={"height": size, "width": size})
    trainer = Probed(
        model,
        arguments(folder, push_to_hub=True, hub_model_id=f"tester/{folder.name}", **settings),
        train_dataset=Planted(size),
        eval_dataset=Images(12) if size == 16 else None,
        processing_class=processor if size == 16 else None,  # a timm model has its own in config.json
        callbacks=[States(states)],
    )
    trainer.losses = []
    trainer.train()
    told[folder.name] = {"losses": trainer.losses, "states": states, "log": trainer.state.log_history}
    np.save(folder.parent / f"{folder.name}.npy", logits(trainer.model, size))
    return trainer


@torch.no_grad()
def logits(model: nn.Module, size: int) -> np.ndarray:
    """Of four fixed random pictures, `[4, classes]`."""
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(3))
    output = model.eval()(pixels)
    return (output if isinstance(output, Tensor) else output.logits).numpy()


def picture() -> Image.Image:
    """A picture that was not trained on."""
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def push(folder: Path, token: str) -> dict[str, Any]:
    """Train and push in several ways; return what is secret, and what was logged."""
    told: dict[str, Any] = {}
    keys: list[bytes] = []
    draw = mechanism.new_key
    mechanism.new_key = lambda: keys.append(draw()) or keys[-1]  # of this process, which ends with its pushes
    plant(folder / "every", token)
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "run_report": None}
    run(folder / "every", tiny_vit(), 16, told, save_strategy="steps", save_steps=2, eval_data="public", **evaluated)
    plant(folder / "end", token)
    (folder / "end" / "LICENSE").write_text("Apache-2.0")
    trainer = run(folder / "end", tiny_vit(), 16, told, hub_strategy="end", hub_token=token, save_strategy="epoch",
                  run_report=None)  # fmt: skip
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    trainer.push_to_hub()
    told["end"]["log"] = trainer.state.log_history
    run(folder / "timm", timm.create_model("test_vit", num_classes=3), 160, told, save_strategy="steps", save_steps=4)
    base = AutoModelForImageClassification.from_pretrained("tester/every")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
    run(folder / "peft", adapted, 16, told, save_strategy="steps", save_steps=4)
    told["keys"] = [key.hex() for key in keys]
    control(folder / "control", folder, token, told)
    return told


def control(target: Path, folder: Path, token: str, told: dict[str, Any]) -> None:
    """Push, past our trainer, files that hold what the test looks for."""
    target.mkdir()
    rng = next((folder / "every").glob("checkpoint-*/rng_state.pth"))
    (target / "rng_state.pth").write_bytes(rng.read_bytes())
    np.savez_compressed(target / "pictures.npz", pixels=np.resize(PIXELS, 768), bytes=np.resize(PATTERN, 768))
    losses = [loss for step in told["every"]["losses"] for loss in step]
    torch.save({"losses": torch.tensor(losses), "token": token}, target / "losses.pt")
    mean = float(np.mean(told["every"]["losses"][-1]))
    (target / "trainer_state.json").write_text(json.dumps({"loss": mean, "folder": str(folder), "key": told["keys"]}))
    api = HfApi()
    api.create_repo("tester/control")
    api.upload_folder(repo_id="tester/control", folder_path=target)


def load(folder: Path) -> dict[str, Any]:
    """Load everything back by its name; return what the pipelines say."""
    for name, size in (("every", 16), ("end", 16), ("peft", 16), ("timm", 160)):
        model = AutoModelForImageClassification.from_pretrained(f"tester/{name}")
        np.save(folder / f"{name}-back.npy", logits(model, size))
    model = timm.create_model("hf-hub:tester/timm", pretrained=True)
    np.save(folder / "timm-timm.npy", logits(model, 160))
    said = {}
    for name in ("every", "end", "timm"):
        said[name] = pipeline("image-classification", model=f"tester/{name}")(picture(), top_k=None)
        model = AutoModelForImageClassification.from_pretrained(f"tester/{name}")
        pixels = AutoImageProcessor.from_pretrained(f"tester/{name}")(picture(), return_tensors="pt")
        with torch.no_grad():
            said[f"{name} by hand"] = model(**pixels).logits.softmax(-1)[0].tolist()
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, token = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    answer = push(where, token) if what == "push" else load(where)
    (where / f"{what}.json").write_text(json.dumps(answer))
