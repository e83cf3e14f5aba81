"""Measure how fast Poisson-sampled batches are loaded, beside an ordinary sequential loader, and in how much memory.

    python recipes/throughput.py                                   # writes throughput.md
    python recipes/throughput.py --images 600 --batch 400 --rounds 2 --workers 1 --report /dev/stdout

Photograph-sized JPEGs are generated onto the disk. Both sides read the same rows with the same decoder, transform
(resize, crop to 224, random mirror), collator, microbatch and number of workers:

* sequential: torch's `DataLoader` over all rows in order, as ordinary training without shuffling would;
* Poisson: the trainer's own loader, every image in every logical batch with probability q, microbatches prefetched
  across logical batches.

Rounds of equal numbers of images alternate; the report has the median of the ratios and their range, and the peak of
the memory that one whole logical batch needs (Pss_Anon and Pss_Shmem of all processes: what is shared counts once,
pages of the memory-mapped file do not). The last report is in throughput.md beside this file.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageFilter
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_dpvision import DPTrainingArguments
from hf_dpvision.data import Augmentation, Columns, ImageExamples, ImageTransform, Preprocessing, image_examples
from hf_dpvision.loader import example_loader
from hf_dpvision.sampling import LogicalBatchIndices, LogicalBatchLoader, MicrobatchStream, PoissonSampler, new_key


WIDTH, HEIGHT, SIDE, MICROBATCH = 500, 375, 224, 64
DIFFERENT = 256  # pictures that are really encoded; the rows repeat them
FEATURES = Features(image=Image(), label=ClassLabel(num_classes=10))


class PeakMemory(threading.Thread):
    """Watches the memory of this process and its children that is not a file's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.ended = 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            self.bytes = max(self.bytes, memory())


def memory() -> int:
    """Bytes of this process and its children, what they share counted once, without mapped files; Linux only."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(_own_bytes(process.pid) for process in processes)


def _own_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def pictures() -> tuple[bytes, ...]:
    """Generate JPEGs of about the size of ImageNet's."""
    generator, encoded = np.random.default_rng(0), []
    for _ in range(DIFFERENT):
        coarse = generator.integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8)
        picture = PILImage.fromarray(coarse).resize((WIDTH, HEIGHT), PILImage.Resampling.BICUBIC)
        jpeg = io.BytesIO()
        picture.filter(ImageFilter.SHARPEN).save(jpeg, "JPEG", quality=90)
        encoded.append(jpeg.getvalue())
    return tuple(encoded)


def rows(encoded: tuple[bytes, ...], images: int) -> Iterator[dict[str, Any]]:
    """So many rows of these pictures."""
    for index in range(images):
        yield {"image": {"bytes": encoded[index % DIFFERENT], "path": None}, "label": index % 10}


def training_set(encoded: tuple[bytes, ...], images: int, folder: Path) -> ImageExamples:
    """The images by index, on the disk, prepared as for a model of 224 pixels."""
    told = {"encoded": encoded, "images": images}
    written = Dataset.from_generator(rows, FEATURES, cache_dir=str(folder), gen_kwargs=told)
    usual = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(size=(SIDE, SIDE), resize=256, mean=usual, std=usual)
    transform = ImageTransform(preprocessing, Augmentation(flip=True))
    return image_examples(written, Columns("image", "label"), transform)


def sequential(dataset: ImageExamples, workers: int) -> Iterator[Any]:
    """Microbatches in order, over and over."""
    loader = DataLoader(
        dataset, MICROBATCH, num_workers=workers, collate_fn=default_data_collator, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        yield from loader


def poisson(dataset: ImageExamples, args: DPTrainingArguments) -> Iterator[Iterator[Any]]:
    """Logical batches as the trainer loads them, each an iterator over its microbatches."""
    sampler = PoissonSampler(new_key(), len(dataset), args.logical_batch_size / len(dataset))
    loader = LogicalBatchLoader(LogicalBatchIndices(sampler, 1_000_000, 0, 1), len(dataset))
    stream = MicrobatchStream(lambda cut: example_loader(dataset, default_data_collator, cut, args), MICROBATCH)
    indices = iter(loader)
    while (batch := stream.next_logical_batch(indices)) is not None:
        yield iter(batch)


@dataclass(frozen=True)
class Round:
    """Images per second of one round of each side."""

    sequential: float
    poisson: float


def rate_of(microbatches: Iterator[Any], images: int) -> float:
    """Take at least so many images and return how many came per second."""
    taken, started = 0, time.perf_counter()
    while taken < images:
        taken += len(next(microbatches)["labels"])
    return taken / (time.perf_counter() - started)


def flat(batches: Iterator[Iterator[Any]]) -> Iterator[Any]:
    """The microbatches of all logical batches; some are small, and none is left out."""
    for batch in batches:
        yield from batch


def measured_rounds(dataset: ImageExamples, args: DPTrainingArguments, images: int, rounds: int) -> list[Round]:
    """Alternate between the sides; the first round fills the queues of the workers and is not counted."""
    workers = args.dataloader_num_workers
    found = []
    for number in range(rounds + 1):
        # a loader whose workers wait with full queues does not disturb the other side, but one that runs ahead does
        sides = {"sequential": sequential(dataset, workers), "poisson": flat(poisson(dataset, args))}
        order = list(sides) if number % 2 else list(sides)[::-1]
        rates = {}
        for name in order:
            source = sides.pop(name)
            for _ in islice(source, 2 * max(workers, 1)):
                pass
            rates[name] = rate_of(source, images)
            del source
        if number:
            found.append(Round(**rates))
    return found


def peak_of_a_batch(dataset: ImageExamples, args: DPTrainingArguments) -> tuple[int, int, int]:
    """Load one logical batch; return its images, the memory before, and the peak."""
    before, peak = memory(), PeakMemory()
    peak.start()
    images = sum(len(microbatch["labels"]) for microbatch in next(poisson(dataset, args)))
    peak.ended.set()
    peak.join()
    return images, before, peak.bytes


def report(options: argparse.Namespace, size: int, rounds: list[Round], peak: tuple[int, int, int]) -> str:
    """Return the findings as Markdown."""
    ratios = [one.poisson / one.sequential for one in rounds]
    images, before, most = peak
    software = ", ".join(f"{name} {version(name)}" for name in ("torch", "datasets", "pillow"))
    rows = {
        "sequential loader, images per second (median)": f"{statistics.median(r.sequential for r in rounds):,.0f}",
        "Poisson-sampled logical batches, images per second (median)": (
            f"{statistics.median(r.poisson for r in rounds):,.0f}"
        ),
        "ratio of the two in one round (median)": f"{statistics.median(ratios):.3f}",
        "smallest and largest ratio": f"{min(ratios):.3f} to {max(ratios):.3f}",
        "images of one logical batch that was loaded whole": f"{images:,}",
        "memory before it": f"{before / 2**20:,.0f} MiB",
        "peak memory while it was loaded, all processes": f"{most / 2**20:,.0f} MiB",
        "the same images as one tensor would be": f"{images * 3 * SIDE * SIDE * 4 / 2**20:,.0f} MiB",
    }
    return "\n".join(
        [
            "# Throughput of the data path",
            "",
            f"Written by `recipes/throughput.py --images {options.images} --batch {options.batch} --rounds "
            f"{options.rounds} --workers {options.workers}` on {date.today().isoformat()},",
            f"{psutil.cpu_count(logical=False)} cores of {platform.machine()}, {software}.",
            "",
            f"{options.images:,} JPEGs of {WIDTH} x {HEIGHT} pixels ({size / 1000:.0f} KB each), prepared to {SIDE} "
            f"pixels; expected logical batch {options.batch:,};",
            f"microbatches of {MICROBATCH}; {options.workers} workers; {len(rounds)} rounds of {options.per_round:,} "
            "images.",
            "",
            "| | |",
            "| --- | ---: |",
            *(f"| {what} | {value} |" for what, value in rows.items()),
            "",
        ]
    )


def main(command_line: Sequence[str] | None = None) -> tuple[list[Round], tuple[int, int, int]]:
    """Measure as told on the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=16_384, help="expected images of a logical batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--per-round", type=int, default=2048, help="images of each side in a round")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args(command_line)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        encoded = pictures()
        size = sum(map(len, encoded)) // DIFFERENT
        dataset = training_set(encoded, options.images, Path(name))
        args = DPTrainingArguments(
            name, noise_multiplier=1.0, target_delta=1e-6, logical_batch_size=options.batch, use_cpu=True,
            dataloader_num_workers=options.workers, dataloader_pin_memory=False, run_report=False,
        )  # fmt: skip
        rounds = measured_rounds(dataset, args, options.per_round, options.rounds)
        peak = peak_of_a_batch(dataset, args)
    options.report.write_text(report(options, size, rounds, peak), encoding="utf-8")
    return rounds, peak


if __name__ == "__main__":
    main()
