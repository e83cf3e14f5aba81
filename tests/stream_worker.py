"""One process of a run of several on a stream, for test_streams.py: `stream_worker.py FOLDER`, under a launcher."""

from __future__ import annotations

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from trainer_cases import trainer, weights  # noqa: E402


def main(folder: Path) -> None:
    """Train on the same stream in both ways; every process has an output folder of its own, as on several machines."""
    from test_streams import STEPS, stream

    rank = int(os.environ["RANK"])
    for way in ("materialise", "windows"):
        run = trainer(
            folder / f"{way}-{rank}", train_dataset=stream(), stream_sampling=way, train_dataset_size=64,
            stream_window_steps=3, max_steps=STEPS,
        )  # fmt: skip
        run.train()
        torch.save(weights(run.model), folder / f"{way}-{rank}.pt")
        report = {"world": run.args.world_size, "left": [p.name for p in (folder / f"{way}-{rank}").glob("stream*")]}
        (folder / f"{way}-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
