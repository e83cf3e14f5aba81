"""Time and memory of a private step beside the non-private one and beside Opacus, measured in turns in one process.

    python recipes/benchmark.py --suite cpu            # every model of the table; writes benchmark.md, .json and .png
    python recipes/benchmark.py --model vit_small_patch16_224 --image-size 224 --batch-size 8
    python recipes/benchmark.py --model vgg19_cifar --image-size 32 --batch-size 32 --threads 2 --largest-batch --json

Sides: the non-private step; ours with one pass and with two, and with each norm rule; Opacus (`hooks`, `ghost`) where
it is installed (extra `dev`). Each is held to a loop over single examples before it is timed, and a peer that is wrong
or cannot run is named with the reason; if one of ours is, the run fails. How times and peaks are taken stands in the
report, and so do the least operations and bytes that a private step can do with, and a profile of both steps. A model
is a name of timm's registry, or `vgg19_cifar` or `resnet18_cifar`, the ones for 32 pixels.

The results of the last run of the suite, with hardware and versions, stand in benchmark.md, benchmark.json and
benchmark.png beside this file; the README quotes them.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


# Before torch starts its threads: waiting threads that spin would be counted as CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from benchmarking.cases import CPU_SUITE, SMOKE_SUITE, Case, Trained
from benchmarking.measure import CaseResult, Settings, measure, own_sides
from benchmarking.report import Record, main_table, markdown, own_faults, side_table, title, write_summary
from benchmarking.sides import Side
from transformers.utils import logging

from hf_dpvision.results import environment


HERE = Path(__file__).parent
SUITES = {"cpu": CPU_SUITE, "smoke": SMOKE_SUITE}


def peers() -> list[Side]:
    """Opacus, if it is installed."""
    if find_spec("opacus") is None:
        return []
    from benchmarking.peers import OpacusGhost, OpacusHooks

    return [OpacusHooks(), OpacusGhost()]


def say(text: str) -> None:
    """Progress; standard output is for the results."""
    print(text, file=sys.stderr, flush=True)


def run(cases: Sequence[Case], settings: Settings, command: str, extra: Sequence[Side] = ()) -> Iterator[Record]:
    """Measure the cases and give, after each, the record of those so far; `extra` sides are tried in every case."""
    load: list[float] = []
    results: list[CaseResult] = []
    hardware, found = environment()
    versions = {name: found[name] for name in ("python", "torch", "transformers", "timm")}
    if find_spec("opacus") is not None:
        versions["opacus"] = version("opacus")
    for case in cases:
        say(f"{case.title}, {case.image_size} px, batch {case.batch_size}, trained: {case.trained.value}")
        load.append(os.getloadavg()[0])
        sides = [*own_sides(case), *(peers() if case.peers else []), *extra]
        results.append(measure(case, sides, settings, say))
        yield Record(
            command,
            torch.get_num_threads(),
            settings.rounds,
            settings.other_rounds,
            settings.memory_gib,
            [*load, os.getloadavg()[0]],
            hardware,
            versions,
            date.today().isoformat(),
            results,
        )


def write(record: Record, report: Path, summary: Path | None) -> None:
    """Write the report, the JSON beside it, the plot if matplotlib is there, and the summary if wanted."""
    report.with_suffix(".json").write_text(record.to_json(), encoding="utf-8")
    picture = report.with_suffix(".png")
    if find_spec("matplotlib") is None:
        say("matplotlib is not installed, so no plot is written: install the extra 'dev'")
        report.write_text(markdown(record, None), encoding="utf-8")
    else:
        from benchmarking.plot import draw

        draw(record, picture)
        report.write_text(markdown(record, picture.name), encoding="utf-8")
    if summary is not None:
        write_summary(summary, record, os.path.relpath(report, summary.parent))


def options_of(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=SUITES, help="the models of the table")
    what.add_argument("--model", help="one model: of timm's registry, vgg19_cifar or resnet18_cifar")
    what.add_argument("--smoke", action="store_true", help="a tiny model, two rounds: does everything run?")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--trained", choices=[choice.value for choice in Trained], default="all")
    parser.add_argument("--largest-batch", action="store_true", help="peaks of larger batches too, and a fit")
    parser.add_argument("--memory-gib", type=float, default=16.0, help="for the largest batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="of the non-private step and ours, one pass")
    parser.add_argument("--other-rounds", type=int, default=3, help="of the other sides")
    parser.add_argument("--slow", type=float, default=5.0, help="sides slower than so many steps have one round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--report", type=Path, help="Markdown file; JSON and plot go beside it; default for a suite")
    parser.add_argument("--summary", type=Path, help="file with the quoted table; for --suite cpu the README")
    options = parser.parse_args(command_line)
    if options.suite == "cpu":
        if options.report is None:
            options.summary = options.summary or HERE.parent / "README.md"
        options.report = options.report or HERE / "benchmark.md"
    if not 1 <= options.other_rounds <= options.rounds or options.batch_size < 2:
        parser.error("1 <= --other-rounds <= --rounds and --batch-size >= 2 are needed")
    return options


def main(command_line: Sequence[str] | None = None, extra: Sequence[Side] = ()) -> Record:
    """Measure as told on the command line, print and write the results.

    Raises:
        SystemExit: one of our sides has wrong gradients or cannot run; the results are written nevertheless.
    """
    options = options_of(command_line)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|opacus|timm|benchmarking")
    device = torch.device(options.device)
    settings = Settings(
        options.rounds, options.other_rounds, options.slow, options.memory_gib, device, options.seed
    )  # fmt: skip
    if options.model:
        cases: Sequence[Case] = [Case(
            options.model, options.model, options.image_size, options.batch_size, Trained(options.trained),
            largest_batch=options.largest_batch,
        )]  # fmt: skip
        command = f"--model {options.model} --image-size {options.image_size} --batch-size {options.batch_size}"
        command += f" --trained {options.trained}"
    else:
        suite = options.suite or "smoke"
        cases, command = SUITES[suite], f"--suite {suite}"
    command += f" --threads {options.threads} --rounds {options.rounds} --other-rounds {options.other_rounds}"
    for record in run(cases, settings, f"python recipes/benchmark.py {command}", extra):  # noqa: B007, the last is used
        if options.report is not None:
            write(record, options.report, options.summary)
    if options.json:
        print(record.to_json(), end="")
    else:
        print("\n".join(main_table(record)))
        for result in record.cases:
            print("\n".join(["", title(result), "", *side_table(result, record.memory_gib)]))
    if wrong := own_faults(record):
        raise SystemExit("\n".join(f"{where}: {side.name}: {side.fault}" for where, side in wrong))
    return record


if __name__ == "__main__":
    main()
