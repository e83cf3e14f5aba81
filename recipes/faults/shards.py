"""Runs of a model that is spread over two processes, which are made for it and end with it."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .bench import BOUND, NOISELESS, Bench
from .models import Pictures, Wide, wide
from .oracle import Oracle


RANKS = 2
SHARD_STEPS, SHARD_SUM_STEPS = 12, 3
SHARD_NOISE = {"noise_multiplier": 1.3, "per_sample_max_grad_norm": 0.7, "logical_batch_size": 6,
               "max_steps": SHARD_STEPS, "per_device_train_batch_size": 8}  # fmt: skip
SHARD_SUMS = {"noise_multiplier": NOISELESS, "per_sample_max_grad_norm": BOUND, "logical_batch_size": 8,
              "max_steps": SHARD_SUM_STEPS, "per_device_train_batch_size": 3}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """What one process saw.

    Attributes:
        noise: its own part of releases without gradients, in claimed deviations, `[steps, own coordinates]`.
        sums: of releases without noise, gathered from all processes, `[steps, coordinates]`.
        read: the rows that it read for each of the latter.
    """

    noise: Tensor
    sums: Tensor
    read: list[list[int]]


class _Local(TrainerCallback):
    """Notes this process's part of what a step releases, or all of it, and the rows read."""

    def __init__(self, pictures: Pictures, gather: bool) -> None:
        self.pictures, self.gather = pictures, gather
        self.released: list[Tensor] = []
        self.read: list[list[int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what rehearsals read."""
        self.pictures.read.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Note the gradients as they are about to be used."""
        gradients = [p.grad.full_tensor() if self.gather else p.grad.to_local() for p in model.parameters()]
        self.released.append(torch.cat([part.reshape(-1) for part in gradients]) * args.logical_batch_size)
        self.read.append(list(self.pictures.read))
        self.pictures.read.clear()


class ShardBench(Bench):
    """Runs over two processes by torch's FSDP2, on the CPU."""

    @cached_property
    def shards(self) -> list[Shard]:
        """What each of two processes saw.

        Raises:
            RuntimeError: a process ended by an error, whose text is shown.
        """
        folder, port = self.folder / "shards", _free_port()
        folder.mkdir()
        children = [os.fork() or self._in_child(rank, port, folder) for rank in range(RANKS)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            told = "\n".join(path.read_text() for path in sorted(folder.glob("*.txt")))
            raise RuntimeError(f"processes ended with {codes}\n{told}")
        return [Shard(**torch.load(folder / f"{rank}.pt")) for rank in range(RANKS)]

    def shard_oracle(self) -> Oracle:
        """What single examples contribute to the sums."""
        return Oracle(wide(), Pictures(16, spread=1.0), BOUND)

    def _in_child(self, rank: int, port: str, folder: Path) -> int:
        """Do the work of one process and end it: nothing of the parent may go on in it."""
        try:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo",
            )  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                torch.save(self._seen_by(folder / f"files{rank}"), folder / f"{rank}.pt")
            os._exit(0)
        except Exception:
            (folder / f"{rank}.txt").write_text(traceback.format_exc())
            os._exit(1)
        finally:
            os._exit(2)

    def _seen_by(self, folder: Path) -> dict[str, Any]:
        noise = self._sharded(folder / "noise", Pictures(48), Wide(), gather=False, scale=0.0, **SHARD_NOISE)
        sums = self._sharded(
            folder / "sums", Pictures(16, spread=1.0), wide(), gather=True, scale=1.0, **SHARD_SUMS
        )
        deviation = SHARD_NOISE["noise_multiplier"] * SHARD_NOISE["per_sample_max_grad_norm"]
        released = torch.stack(noise.released).double() / deviation
        return {"noise": released, "sums": torch.stack(sums.released).double(), "read": sums.read}

    def _sharded(
        self, folder: Path, pictures: Pictures, model: nn.Module, *, gather: bool, scale: float, **settings: Any
    ) -> _Local:
        parts, watcher = self.parts, _Local(pictures, gather)

        def losses(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]
            return scale * parts.losses(logits, labels)

        with parts.in_place():
            trainer = parts.trainer(
                parts.model(model), parts.arguments(folder, fsdp=True, **settings), train_dataset=pictures,
                callbacks=[watcher], compute_loss_func=losses, randomness=parts.randomness(),
            )  # fmt: skip
            trainer.train()
        return watcher


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
