"""The arguments that say how a stream is sampled; part of `DPTrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .errors import ArgumentRefused
from .numeric import is_count
from .streaming import Streaming, Way


@dataclass
class StreamArguments:
    """They have no effect on a training set with random access."""

    train_dataset_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of training examples if train_dataset is a stream that does not tell it. It is public: "
            "the sample rate is logical_batch_size / train_dataset_size."
        },
    )
    stream_sampling: str = field(
        default="auto",
        metadata={
            "help": "How a stream (datasets.IterableDataset) is sampled. 'materialise' keeps all rows on the disk "
            "once and draws by index; 'windows' goes through the stream once for the next stream_window_steps steps "
            "and keeps what they draw: both are Poisson sampling, at the same epsilon. 'auto' chooses by the number "
            "of epochs and the disk.",
            "choices": [way.value for way in Way],
        },
    )
    stream_window_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps served by one pass over the stream with stream_sampling 'windows': fewer need less disk "
            "and more passes. By default as many as an epoch has, or as half of the free disk allows."
        },
    )
    stream_dir: str | None = field(
        default=None,
        metadata={
            "help": "Private folder for rows of a stream, seen by all processes. By default 'stream' in output_dir, "
            "deleted when training has ended; given here, materialised rows stay for further runs."
        },
    )

    def build_streaming(self, output_dir: str) -> Streaming:
        """Return how a stream is to be sampled, its rows being kept below `output_dir` if no folder was named.

        Raises:
            ArgumentRefused: a number is none of rows or steps.
        """
        for name in ("train_dataset_size", "stream_window_steps"):
            value = getattr(self, name)
            if value is not None and not is_count(value):
                raise ArgumentRefused(f"{name}={value!r} is not a whole number of at least 1. Leave it out, or count.")
        return Streaming(
            way=Way(self.stream_sampling),
            folder=Path(self.stream_dir or Path(output_dir) / "stream"),
            stays=self.stream_dir is not None,
            window_steps=self.stream_window_steps,
            size=self.train_dataset_size,
        )
