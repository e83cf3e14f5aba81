"""Kill a training run at random moments, resume it each time, and check that nothing that was spent is forgotten.

    python recipes/fault_drill.py                      # 100 kills, a few minutes on one core; writes fault_drill.md
    python recipes/fault_drill.py --kills 5 --terminations 0 --report /dev/stdout

Each life of the run is a process of its own that is ended a random time after its training has begun: by SIGKILL, or
by SIGTERM, upon which it has to finish its step, to save a checkpoint and to leave with code 143. A tiny ViT is
trained on random pictures; noise and draws are the real ones. A digest of all noise that a life draws is written down
outside the run. After each life: the ledger on disk has at least as many steps as noise was drawn for, no noise vector
was drawn twice, the ledger has not shrunk, and the newest checkpoint is whole (an older one may be half removed);
after SIGTERM, it is behind the last step of the ledger. A life that ends in any other way than by its signal or by
finishing its steps is an error.

The last report is in fault_drill.md beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from logging import getLogger
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, logging

from hf_dpvision import DPTrainer, DPTrainingArguments, accounting
from hf_dpvision.accounting.journal import read_journal
from hf_dpvision.checkpoints import find_resume_point
from hf_dpvision.drafts import Draft
from hf_dpvision.mechanism import SystemRandomness
from hf_dpvision.noise import NoiseSource
from hf_dpvision.termination import EXIT_CODE


STEPS, EXAMPLES, BATCH, SIGMA, DELTA = 40, 256, 16, 1.0, 1e-4
LONGEST_LIFE = 0.8  # seconds from the start of training to the kill, at most


class Pictures(Dataset):
    """Random pictures `[3, 16, 16]` of three classes."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % 3}


class WrittenNoise(NoiseSource):
    """Real noise; a digest of every draw is written down before the draw is handed out."""

    log: Path

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        noise = super().normal(shape, std)
        if noise.numel() > 16:  # a few numbers might be equal by chance
            with self.log.open("a") as file:
                file.write(hashlib.sha256(noise.numpy().tobytes()).hexdigest() + "\n")
        return noise


class WrittenRandomness(SystemRandomness):
    """The operating system's entropy, with the noise written down."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def noise_source(self, device: torch.device) -> Callable[[int], NoiseSource]:
        source = WrittenNoise.from_os_entropy(device)
        source.log = self.log
        return lambda step: source


class Begun(TrainerCallback):
    """Tells the drill that training has begun."""

    def __init__(self, started: Path) -> None:
        self.started = started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the file that the drill waits for."""
        self.started.touch()


def tiny_vit() -> ViTForImageClassification:
    """One block; the same first weights in every life."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))


def large_parameters() -> int:
    """How many digests one step writes."""
    return sum(parameter.numel() > 16 for parameter in tiny_vit().parameters())


def live(folder: Path, log: Path, started: Path) -> None:
    """One life: begin the run or take it up again, and train to its end unless killed before."""
    torch.set_num_threads(1)
    errors = started.with_name("last-life.txt").open("w")
    os.dup2(errors.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    logging.set_verbosity_error()
    args = DPTrainingArguments(
        str(folder), noise_multiplier=SIGMA, target_delta=DELTA, logical_batch_size=BATCH, max_steps=STEPS,
        per_device_train_batch_size=BATCH, learning_rate=1e-3, save_strategy="steps", save_steps=4, use_cpu=True,
        disable_tqdm=True, self_check=False, accountant="rdp", logging_strategy="no", run_report=False,
    )  # fmt: skip
    trainer = DPTrainer(
        tiny_vit(), args, train_dataset=Pictures(), randomness=WrittenRandomness(log), callbacks=[Begun(started)]
    )
    begun = (folder / "privacy" / "ledger.jsonl").exists()
    trainer.train(resume_from_checkpoint=begun)


@dataclass
class Findings:
    """What the drill saw; the report is made from it."""

    kills: int = 0
    terminations: int = 0
    resumed: int = 0
    finished_runs: int = 0
    torn_ledgers: int = 0
    drafts: int = 0
    newest_checkpoints: int = 0
    charged: int = 0
    drawn: int = 0
    digests: int = 0
    most_without_noise: int = 0
    killed_behind: list[int] = field(default_factory=list)


def inspect(folder: Path, log: Path, spent_before: int, found: Findings) -> tuple[int, int]:
    """Check a run after one of its lives; return the steps charged and the steps that drew noise.

    Raises:
        RuntimeError: something that was spent is not in the ledger, or noise was drawn twice.
        ArgumentRefused: the newest checkpoint is not whole.
    """
    digests = log.read_text().split() if log.exists() else []
    drawn = -(-len(digests) // large_parameters())
    history = read_journal(folder)
    charged = 0 if history is None else history.ledger.steps
    if len(set(digests)) != len(digests):
        raise RuntimeError(f"{len(digests) - len(set(digests))} noise vectors were drawn twice")
    if not max(drawn, spent_before) <= charged:
        raise RuntimeError(f"the ledger has {charged} steps; noise was drawn for {drawn}, and it had {spent_before}")
    found.torn_ledgers += history is not None and history.torn_at is not None
    found.drafts += Draft(folder, "checkpoint-0").root.exists()
    newest = max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)
    if newest:
        find_resume_point(str(folder / f"checkpoint-{newest}"), folder)  # raises if it is not whole
        found.newest_checkpoints += 1
    return charged, drawn


def end(process: BaseProcess, started: Path, root: Path, ending: signal.Signals | None, seconds: float) -> None:
    """Let a life begin, send it the signal after that time (or let it finish), and wait for its end.

    Raises:
        RuntimeError: it ended neither by the signal nor by finishing.
    """
    process.start()
    while process.is_alive() and not started.exists():
        time.sleep(0.005)
    process.join(seconds if ending is not None else None)
    if process.is_alive():
        os.kill(process.pid, ending)
        process.join()
    expected = {None: 0, signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: EXIT_CODE}[ending]
    if process.exitcode not in (0, expected):
        said = (root / "last-life.txt").read_text()
        raise RuntimeError(f"a life to be ended by {ending!r} ended with exit code {process.exitcode}:\n{said}")


def drill(endings: list[signal.Signals], root: Path, choose: random.Random, context: BaseContext) -> Findings:
    """End and resume lives by these signals, one after the other, and let the last run finish."""
    found, number, left = Findings(), 0, deque(endings)
    while left:
        number += 1
        folder, log = root / f"run-{number}", root / f"noise-{number}"
        spent = drawn = lives = 0
        while True:
            lives += 1
            started = root / f"started-{number}-{lives}"
            process = context.Process(target=live, args=(folder, log, started))
            end(process, started, root, left[0] if left else None, choose.uniform(0, LONGEST_LIFE))
            before, (spent, drawn) = spent, inspect(folder, log, spent, found)
            found.resumed += lives > 1 and spent > before
            found.most_without_noise = max(found.most_without_noise, spent - drawn)
            if process.exitcode == 0:
                break
            behind = find_resume_point(True, folder).step
            if left.popleft() == signal.SIGKILL:
                found.kills += 1
                found.killed_behind.append(behind)
            else:
                found.terminations += 1
                said = json.loads((folder / f"checkpoint-{behind}" / "privacy.json").read_text())
                if said["steps"] != spent:
                    raise RuntimeError(f"SIGTERM lost steps: {spent} are charged, {said['steps']} in the checkpoint")
            if behind == STEPS:
                break  # ended behind its last checkpoint: nothing is left to be resumed
        said = json.loads((folder / f"checkpoint-{STEPS}" / "privacy.json").read_text())
        true = accounting.epsilon(
            sample_rate=BATCH / EXAMPLES, noise_multiplier=SIGMA, steps=drawn, delta=DELTA, accountant="rdp"
        )
        if said["guarantee"]["epsilon"] < true.upper:
            raise RuntimeError(f"{said['guarantee']} is claimed, and noise was drawn for {true}")
        found.finished_runs += 1
        found.charged, found.drawn = found.charged + spent, found.drawn + drawn
        found.digests += len(log.read_text().split())
        ended = found.kills + found.terminations
        print(f"run {number}: {lives} lives, {spent} steps charged, {ended} lives ended so far", flush=True)
    return found


def report(found: Findings) -> str:
    """Return the findings as Markdown."""
    rows = {
        "kills by SIGKILL at random moments": found.kills,
        "ended by SIGTERM at random moments, with exit code 143": found.terminations,
        "runs, each brought to its last step": found.finished_runs,
        "lives that took a run up again and charged steps": found.resumed,
        "kills before the first whole checkpoint": found.killed_behind.count(0),
        "kills behind the last checkpoint": found.killed_behind.count(STEPS),
        "kills that left a draft of a checkpoint": found.drafts,
        "newest checkpoints compared with their checksums": found.newest_checkpoints,
        "newest checkpoints that were not whole": 0,
        "steps lost by SIGTERM": 0,
        "kills that left a torn line in the ledger": found.torn_ledgers,
        "lives that failed to resume": 0,
        "steps charged in the ledgers": found.charged,
        "steps that drew noise": found.drawn,
        "most steps of one run charged without noise": found.most_without_noise,
        "noise vectors drawn": found.digests,
        "noise vectors drawn twice": 0,
        "runs whose claimed epsilon is below that of the steps that drew noise": 0,
    }
    lines = [f"| {what} | {count:,} |" for what, count in rows.items()]
    software = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    return "\n".join(
        [
            "# Fault drill",
            "",
            "Written by `recipes/fault_drill.py`, which fails at the first violation; a zero below was checked after",
            f"every life. Each run has {STEPS} steps and a checkpoint every 4. One CPU core, {software}.",
            "",
            "| | count |",
            "| --- | ---: |",
            *lines,
            "",
        ]
    )


def main(command_line: Sequence[str] | None = None) -> Findings:
    """Run the drill as told on the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="by SIGKILL")
    parser.add_argument("--terminations", type=int, default=25, help="by SIGTERM, in between")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills; noise has none")
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args(command_line)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_dpvision.trainer"])
    getLogger("hf_dpvision.checkpoints").setLevel("ERROR")  # it says whenever a run has no checkpoint yet
    choose = random.Random(options.seed)
    endings = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terminations
    choose.shuffle(endings)
    with tempfile.TemporaryDirectory() as root:
        found = drill(endings, Path(root), choose, context)
    options.report.write_text(report(found), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
