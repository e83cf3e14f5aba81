"""Train on a stream that is killed while its rows are kept, and check memory, disk, resume and the claim.

    python recipes/stream_drill.py                     # 100,000 images in 50 files; writes stream_drill.md
    python recipes/stream_drill.py --images 36000 --files 4 --side 16 --epochs 0.03 --report /dev/stdout

Pictures are generated into parquet files of ImageNet's columns (`image`, `label`) and read back as a stream. A tiny
ViT is trained on it in three ways: by index, for comparison; with all rows kept first (`materialise`); and window by
window (`windows`, two passes). In both ways of streaming the first process is ended by SIGKILL in the middle of a
pass, the second takes the run up again. After it: the pass went on where its last whole file of rows ended, each
planned step is in the ledger and none is charged twice, `hf-dpvision verify` finds nothing to say about the released
folder, the claim is that of the run by index, and no row is left on the disk. Peak memory is that of the process
without files mapped into it (RssAnon). A violation ends the drill with an error.

The last report is in stream_drill.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, load_dataset
from PIL import Image as PILImage
from transformers import ViTConfig, ViTForImageClassification, logging

from hf_dpvision import DPTrainer, DPTrainingArguments
from hf_dpvision.data import Columns, ImageTransform, Preprocessing, image_examples, image_stream
from hf_dpvision.data.shards import Progress
from hf_dpvision.model_card import write_model_card
from hf_dpvision.verify import verify_folder


CLASSES, SIGMA, DELTA = 10, 1.0, 1e-6
FEATURES = Features(image=Image(), label=ClassLabel(num_classes=CLASSES))
WAYS = ("by index", "materialise", "windows")


@dataclass(frozen=True)
class Setting:
    """What is trained on, and where.

    Attributes:
        pattern: of the parquet files.
        images: their number.
        side: of a picture.
        batch: expected examples per step.
        steps: planned.
    """

    pattern: str
    images: int
    side: int
    batch: int
    steps: int

    @property
    def window_steps(self) -> int:
        """Of the first of two windows."""
        return 2 * self.steps // 3


class Dying:
    """Passes every row of a stream on; ends the process by SIGKILL at one row of one pass, if told so."""

    def __init__(self, at_pass: int, at_row: int) -> None:
        self.at_pass, self.at_row, self.passes = at_pass, at_row, 0

    def __call__(self, rows: pa.Table, indices: list[int]) -> pa.Table:
        self.passes += indices[0] == 0
        if self.passes == self.at_pass and indices[-1] >= self.at_row:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows


class PeakMemory(threading.Thread):
    """Watches the memory of this process that is not a file's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.ended = 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory of this process without files mapped into it; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this drill needs Linux")


def write_images(folder: Path, images: int, files: int, side: int) -> int:
    """Generate coloured noise as JPEG, in files of equal size; return their bytes."""
    folder.mkdir()
    for number in range(files):
        generator = np.random.default_rng(number)
        rows = []
        for index in range(number * images // files, (number + 1) * images // files):
            pixels = generator.integers(0, 128, (side, side, 3), dtype=np.uint8)
            pixels[..., index % 3] += np.uint8(12 * (index % CLASSES))
            rows.append({"image": PILImage.fromarray(pixels), "label": index % CLASSES})
        Dataset.from_list(rows, features=FEATURES).to_parquet(folder / f"train-{number:05}-of-{files:05}.parquet")
    return sum(file.stat().st_size for file in folder.iterdir())


def tiny_vit(side: int) -> ViTForImageClassification:
    """Two blocks; the same first weights in every life."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=side, patch_size=side // 4, num_labels=CLASSES, **sizes))


def live(setting: Setting, way: str, folder: Path, dying: Dying, found: Path) -> None:
    """One life: begin the run or take it up again, train to its end unless killed, and save the model."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    before, peak = anonymous_bytes(), PeakMemory()
    peak.start()
    args = DPTrainingArguments(
        str(folder), noise_multiplier=SIGMA, target_delta=DELTA, logical_batch_size=setting.batch,
        max_steps=setting.steps, per_device_train_batch_size=250, learning_rate=1e-3, save_strategy="steps",
        save_steps=setting.window_steps, use_cpu=True, disable_tqdm=True, logging_strategy="no",
        train_dataset_size=setting.images, stream_window_steps=setting.window_steps,
        stream_sampling="auto" if way == "by index" else way, run_report=False,
    )  # fmt: skip
    trainer = DPTrainer(tiny_vit(setting.side), args, train_dataset=training_set(setting, way, dying))
    trainer.train(resume_from_checkpoint=(folder / "privacy" / "ledger.jsonl").exists())
    released = folder.with_name(f"{folder.name}-released")
    trainer.save_model(str(released))
    (released / "training_args.bin").unlink()  # stays with whoever trained
    write_model_card(released, trainer.privacy_statement(), model_name=released.name)
    peak.ended.set()
    peak.join()
    said = {"before": before, "peak": peak.bytes, "passes": dying.passes - 1}
    found.write_text(json.dumps(said))


def training_set(setting: Setting, way: str, dying: Dying) -> object:
    """The images by index, or as a stream that may end the process."""
    columns = Columns("image", "label")
    mean = (0.5, 0.5, 0.5)
    side = (setting.side, setting.side)
    transform = ImageTransform(Preprocessing(size=side, resize=side, mean=mean, std=mean))
    files = {"train": setting.pattern}
    if way == "by index":
        cache = str(Path(setting.pattern).parent.with_name("cache"))
        rows = load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        return image_examples(rows, columns, transform)
    stream: IterableDataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
    stream = stream.with_format("arrow").map(
        dying, batched=True, batch_size=64, with_indices=True, features=FEATURES
    )
    return image_stream(stream, columns, transform)


def killed_life(context: BaseContext, setting: Setting, way: str, folder: Path, root: Path) -> tuple[int, int]:
    """Let a process die in the middle of a pass; return the row at which it died and the rows kept safe by then.

    Raises:
        RuntimeError: it did not die of the kill, or had kept nothing.
    """
    at_pass, at_row = (3 if way == "windows" else 2), 2 * setting.images // 3  # the first pass looks at the head
    process = context.Process(target=live, args=(setting, way, folder, Dying(at_pass, at_row), root / "unused"))
    process.start()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"{way}: the first process was to be killed and ended with {process.exitcode}")
    unfinished = [p for f in (folder / "stream").iterdir() if (p := Progress.read(f)) is not None and not p.complete]
    if len(unfinished) != 1 or not 0 < unfinished[0].seen < at_row:
        raise RuntimeError(f"{way}: {[progress.seen for progress in unfinished]} rows were kept when it was killed")
    return at_row, unfinished[0].seen


def run(context: BaseContext, setting: Setting, way: str, root: Path) -> dict[str, object]:
    """Train in one way, with a kill where there is a stream, and check what the folder says.

    Raises:
        RuntimeError: something is not as it has to be.
    """
    folder, found = root / way.replace(" ", "-"), root / f"{way}.json"
    died, kept = (None, None) if way == "by index" else killed_life(context, setting, way, folder, root)
    dying = Dying(-1, 0)
    process = context.Process(target=live, args=(setting, way, folder, dying, found))
    process.start()
    most_on_disk = 0
    while process.is_alive():
        process.join(0.05)
        most_on_disk = max(most_on_disk, bytes_below(folder / "stream"))
    if process.exitcode != 0:
        raise RuntimeError(f"{way}: the process ended with exit code {process.exitcode}")
    checked = verify_folder(folder.with_name(f"{folder.name}-released"), ("prv",))
    if checked.findings:
        raise RuntimeError(f"{way}: {checked.findings}")
    if (folder / "stream").exists():
        raise RuntimeError(f"{way}: rows of the stream are left on the disk")
    statement = checked.statement
    if statement["steps"] != setting.steps:
        raise RuntimeError(f"{way}: {statement['steps']} steps are charged, {setting.steps} were planned")
    guarantee = {name: statement["guarantee"][name] for name in ("epsilon", "delta")}
    return {**json.loads(found.read_text()), **guarantee, "died": died, "kept": kept, "disk": most_on_disk}


def bytes_below(folder: Path) -> int:
    """Of all files; those deleted meanwhile count nothing, nor do folders."""
    total = 0
    for place, _, names in os.walk(folder):  # unlike a glob, silent about folders that vanish
        for name in names:
            try:
                total += Path(place, name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def report(setting: Setting, files: int, data: int, results: dict[str, dict]) -> str:
    """Return the findings as Markdown."""

    def megabytes(count: int) -> str:
        return f"{count / 1e6:,.0f} MB"

    rows = {
        "row of the pass at which the first process was killed": lambda r: _count(r["died"]),
        "rows that it had kept safe, and that were not kept again": lambda r: _count(r["kept"]),
        "passes that the second process began, beside the rest of the interrupted one": lambda r: (
            "" if r["died"] is None else str(r["passes"])
        ),
        "memory of the second process before it began": lambda r: megabytes(r["before"]),
        "its peak memory, files not counted": lambda r: megabytes(r["peak"]),
        "most of the stream on the disk": lambda r: megabytes(r["disk"]),
        "epsilon claimed": lambda r: f"{r['epsilon']:.4f}",
    }
    lines = [f"| {name} | {' | '.join(value(results[way]) for way in WAYS)} |" for name, value in rows.items()]
    software = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets"))
    return "\n".join(
        [
            "# Stream drill",
            "",
            "Written by `recipes/stream_drill.py`, which fails at the first violation. One CPU thread, "
            f"{software}, {date.today().isoformat()}.",
            "",
            f"{setting.images:,} generated images of {setting.side} pixels in {files} files, {megabytes(data)};",
            f"{setting.steps} steps of expected batch {setting.batch:,}, sigma {SIGMA:g}, delta {DELTA:g}. In all",
            "runs `verify` agreed, every planned step was charged once, and no row was left on the disk.",
            "",
            f"| | {' | '.join(WAYS)} |",
            f"| --- |{' ---: |' * len(WAYS)}",
            *lines,
            "",
        ]
    )


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def main(command_line: Sequence[str] | None = None) -> dict[str, dict]:
    """Run the drill as told on the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=50)
    parser.add_argument("--side", type=int, default=64, help="of a picture, in pixels")
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args(command_line)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_dpvision.trainer"])
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = write_images(root / "images", options.images, options.files, options.side)
        batch, pattern = options.images // 100, str(root / "images" / "*.parquet")
        steps = round(options.epochs * options.images / batch)
        setting = Setting(pattern, options.images, options.side, batch, steps)
        results = {}
        for way in WAYS:
            results[way] = run(context, setting, way, root)
            print(f"{way}: {results[way]}", flush=True)
    if len({result["epsilon"] for result in results.values()}) != 1:
        raise RuntimeError("the ways claim different epsilons for the same steps")
    options.report.write_text(report(setting, options.files, data, results), encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
