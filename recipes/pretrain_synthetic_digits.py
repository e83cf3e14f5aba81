"""Pretrain the small BEiT of the embedded default recipe on public synthetic digits.

Every training image is drawn here, with the font built into Pillow: no photograph, scan or private record is read,
so the weights carry no privacy cost. The drawing follows the public description of the scans that the recipe then
fine-tunes on (Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits": size-normalised 32x32
bitmaps whose 4x4 blocks are counted into an 8x8 image of values 0..16); it was not fitted to the scans themselves.

    python recipes/pretrain_synthetic_digits.py

writes `config.json`, `model.safetensors`, `preprocessor_config.json` and a `README.md` with the command, the
versions, the date and the SHA-256 of the weights. About twelve minutes on one core.
"""

import argparse
import functools
import hashlib
import math
import platform
import sys
from datetime import date
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm.auto import tqdm
from transformers import BeitConfig, BeitForImageClassification, BeitImageProcessor


CANVAS = 96  # pixels of the drawing, before the digit is cut out and size-normalised
BITMAP = 32  # pixels of the size-normalised black and white bitmap
BLOCK = 4  # pixels of a block of the bitmap that is counted into one pixel of the scan
LEVELS = BLOCK * BLOCK  # a scan's pixel is an integer in 0..LEVELS


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def draw_digit(digit: int, rng: np.random.Generator) -> Image.Image:
    """Draw one digit as an 8x8 grey image ("L", ink bright), like a low-resolution scan.

    Random size and stroke, then a bend, rotation and shear, then blur, threshold, specks, block counts and contrast.

    Args:
        digit: 0 to 9.
        rng: source of all randomness; the same state gives the same image.

    Returns:
        An 8x8 image whose values are multiples of 255/16, rounded down.
    """
    font = _font(int(rng.integers(44, 61)))
    canvas = Image.new("L", (CANVAS, CANVAS))
    stroke = int(rng.integers(0, 3))
    centre = (CANVAS / 2, CANVAS / 2)
    ImageDraw.Draw(canvas).text(centre, str(digit), fill=255, font=font, anchor="mm", stroke_width=stroke)
    bitmap = _normalise_size(_distort(canvas, rng), rng).filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 1.2)))
    ink = np.asarray(bitmap) > rng.uniform(70, 180)
    ink ^= rng.random(ink.shape) < rng.choice([0.0, 0.005, 0.02])
    blocks = ink.reshape(BITMAP // BLOCK, BLOCK, BITMAP // BLOCK, BLOCK).sum(axis=(1, 3))
    scan = np.rint(blocks * rng.uniform(0.75, 1.0)).astype(np.int64)
    return Image.fromarray((scan * 255 // LEVELS).astype(np.uint8))


def _distort(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Bend, rotate and shear the drawing: each cell of a 3x3 mesh shows a displaced cell of the original."""
    angle, shear = math.radians(rng.uniform(-15, 15)), rng.uniform(-0.35, 0.35)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = rotation @ np.array([[1.0, shear], [0.0, 1.0]]) * rng.uniform(0.9, 1.1, size=2)
    lines = np.linspace(0, CANVAS, 4)
    nodes = np.stack(np.meshgrid(lines, lines), axis=-1) - CANVAS / 2
    sources = nodes @ matrix.T + CANVAS / 2 + rng.normal(0.0, 0.03 * CANVAS, size=nodes.shape)
    mesh = []
    for row in range(3):
        for column in range(3):
            box = tuple(int(lines[i]) for i in (column, row, column + 1, row + 1))
            corners = [sources[row + i, column + j] for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
            mesh.append((box, tuple(np.concatenate(corners))))
    return canvas.transform(canvas.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _normalise_size(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut the ink out and fit it to the bitmap's height, at a random width and near the middle."""
    glyph = drawing.crop(drawing.getbbox())
    height = int(rng.integers(BITMAP - 5, BITMAP + 1))
    width = round(height * glyph.width / glyph.height * rng.uniform(0.75, 1.25))
    width = min(max(width, 4), BITMAP - 4)
    left = (BITMAP - width) // 2 + int(rng.integers(-2, 3))
    bitmap = Image.new("L", (BITMAP, BITMAP))
    top = int(rng.integers(0, BITMAP + 1 - height))
    bitmap.paste(glyph.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    return bitmap


def draw_batch(size: int, rng: np.random.Generator) -> tuple[list[Image.Image], torch.Tensor]:
    """Draw `size` digits with uniform labels; returns the 8x8 images and the labels `[size]`."""
    labels = rng.integers(0, 10, size=size)
    return [draw_digit(int(label), rng).convert("RGB") for label in labels], torch.from_numpy(labels)


def build_model() -> BeitForImageClassification:
    """A BEiT with relative position bias and layer scale, 0.98 M parameters, for 32x32 colour images."""
    names = [str(digit) for digit in range(10)]
    config = BeitConfig(
        image_size=32,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=480,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        layer_scale_init_value=0.1,
        use_relative_position_bias=True,
        use_mean_pooling=True,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return BeitForImageClassification(config)


def build_processor() -> BeitImageProcessor:
    """Resize to 32x32, scale to [-1, 1]."""
    side = {"height": 32, "width": 32}
    return BeitImageProcessor(
        do_resize=True,
        size=side,
        resample=Image.Resampling.BILINEAR,
        do_center_crop=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_reduce_labels=False,
    )


def train(
    model: BeitForImageClassification,
    processor: BeitImageProcessor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    rng: np.random.Generator,
) -> None:
    """AdamW with linear warm-up over the first twentieth and cosine decay; every batch is drawn anew."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    )
    model.train()
    bar = tqdm(range(steps), desc="pretraining", unit="step")
    for _ in bar:
        images, labels = draw_batch(batch_size, rng)
        logits = model(**processor(images, return_tensors="pt")).logits
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def synthetic_accuracy(
    model: BeitForImageClassification, processor: BeitImageProcessor, count: int, rng: np.random.Generator
) -> float:
    """Share of `count` newly drawn digits that the model names correctly."""
    model.eval()
    images, labels = draw_batch(count, rng)
    logits = model(**processor(images, return_tensors="pt")).logits
    return (logits.argmax(dim=-1) == labels).float().mean().item()


README = """# A small BEiT pretrained on synthetic digits

`transformers.BeitForImageClassification` with {parameters:,} parameters: 32x32 colour input, patches of 8x8, hidden
size {hidden}, {layers} layers, relative position bias, layer scale, mean pooling; ten classes, the digits 0 to 9.

It is the public starting point of the embedded default of `recipes/finetune_image_classification.py`
(`recipes/digits_beit.yaml`). It has seen {images:,} synthetic digits and no real image: each was drawn by
`recipes/pretrain_synthetic_digits.py` with the font built into Pillow, distorted, and reduced to 8x8 pixels of 17 grey
levels. So fine-tuning it privately starts from weights that carry no privacy cost.

| | |
|---|---|
| command | `{command}` |
| date | {date} |
| versions | Python {python}, torch {torch}, transformers {transformers}, Pillow {pillow}, numpy {numpy} |
| seed, threads | {seed}, {threads} |
| accuracy on {held_out:,} newly drawn digits | {accuracy:.4f} |
| `model.safetensors` | {size:,} bytes |
| SHA-256 of `model.safetensors` | `{sha256}` |

The same command, seed, number of threads, versions and kind of processor give the same file; elsewhere floating-point
sums may round differently, which changes the hash but not the use.

**Licence.** The weights are under the Apache License 2.0, like this repository. The font is a subset of Aileron
Regular by Sora Sagano (dotcolon.net), which is dedicated to the public domain (CC0 1.0; the font file itself says "No
Rights Reserved"). Pillow ships it (`ImageFont.load_default(size=...)`); it is not copied here.
"""


def write_readme(
    folder: Path, model: BeitForImageClassification, options: argparse.Namespace, accuracy: float
) -> None:
    """Write `README.md` beside the weights: what they are, the command, versions, date, hash and licence."""
    weights = (folder / "model.safetensors").read_bytes()
    flags = " ".join(f"--{name} {value}" for name, value in vars(options).items() if name != "output_dir")
    text = README.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden=model.config.hidden_size,
        layers=model.config.num_hidden_layers,
        images=options.steps * options.batch_size,
        command=f"python recipes/pretrain_synthetic_digits.py {flags}",
        date=date.today().isoformat(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        pillow=PIL.__version__,
        numpy=np.__version__,
        seed=options.seed,
        threads=options.threads,
        held_out=options.held_out,
        accuracy=accuracy,
        size=len(weights),
        sha256=hashlib.sha256(weights).hexdigest(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "digits_beit")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=128, help="digits drawn per step")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="highest learning rate of AdamW")
    parser.add_argument("--held_out", type=int, default=2000, help="digits drawn for the accuracy at the end")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the drawing")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "held_out", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: list[str]) -> None:
    """Pretrain, measure on held-out synthetic digits, save."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    training, held_out = (np.random.default_rng([options.seed, stream]) for stream in (0, 1))
    model, processor = build_model(), build_processor()
    train(
        model,
        processor,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        rng=training,
    )
    accuracy = synthetic_accuracy(model, processor, options.held_out, held_out)
    model.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)
    write_readme(options.output_dir, model, options, accuracy)
    print(f"accuracy on {options.held_out} newly drawn digits: {accuracy:.4f}; weights in {options.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
