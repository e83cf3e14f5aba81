"""What crosses processes: an agreement, the key, the ledger and the weights once, the sums once per logical step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import ArgumentRefused, ProcessLost


def refuse_disagreement(digests: Mapping[str, str]) -> None:
    """Raise, on every process, unless all of them were started with the same `digests`.

    Args:
        digests: what has to agree, by name (`agreement.digests`); short texts, for they are compared as they are.

    Raises:
        ArgumentRefused: naming what differs, and which process differs from the first.
        ProcessLost: a process ended before it could be asked.
    """
    if not _several():
        return
    everyone: list[Mapping[str, str]] = [{}] * dist.get_world_size()
    with _all_alive():
        dist.all_gather_object(everyone, dict(digests))
    first = everyone[0]
    for rank, other in enumerate(everyone):
        differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if differing:
            raise ArgumentRefused(
                f"Process {rank} differs from process 0 in {', '.join(differing)}: their gradients would be added up "
                "all the same, and the ledger of process 0 would describe only its own. Start all processes with "
                "the same command, package version and data."
            )


def same_key(key: bytes, device: torch.device) -> bytes:
    """Return the key of rank 0, on every process; with one process, `key` itself.

    Raises:
        ProcessLost: another process has ended.
    """
    if not _several():
        return key
    shared = torch.tensor(list(key), dtype=torch.uint8, device=device)
    with _all_alive():
        dist.broadcast(shared, src=0)
    return bytes(shared.tolist())


def same_text(text: str, device: torch.device) -> str:
    """Return the text of rank 0, on every process; with one process, `text` itself."""
    if not _several():
        return text
    content = text.encode()
    length = torch.tensor([len(content)], device=device)
    dist.broadcast(length, src=0)
    shared = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        shared = torch.tensor(list(content), dtype=torch.uint8, device=device)
    dist.broadcast(shared, src=0)
    return bytes(shared.tolist()).decode()


def any_of(said: bool, device: torch.device) -> bool:
    """Return whether any process says so, on every process; with one process, `said` itself.

    Raises:
        ProcessLost: another process has ended.
    """
    if not _several():
        return said
    told = torch.tensor([int(said)], device=device)
    with _all_alive():
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def same_weights(model: nn.Module, device: torch.device) -> None:
    """Overwrite parameters and buffers with those of rank 0, sent by way of `device`.

    Raises:
        ProcessLost: another process has ended.
    """
    if _several():
        with _all_alive():
            for tensor in (*model.parameters(), *model.buffers()):
                sent = tensor.data.to(device)
                dist.broadcast(sent, src=0)
                tensor.data.copy_(sent)


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return not _several() or dist.get_rank() == 0


def total(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums over all processes, bit-identical on each of them, in one reduction.

    Raises:
        ProcessLost: another process has ended, so the sum of this step cannot be completed.
    """
    if not _several():
        return dict(sums)
    flat = _flat(sums)
    with _all_alive():
        dist.all_reduce(flat)
    return _cut(flat, sums)


def of_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of rank 0, on every process, in one transfer; with one process, the tensors themselves.

    Raises:
        ProcessLost: another process has ended.
    """
    if not _several():
        return dict(tensors)
    flat = _flat(tensors)
    with _all_alive():
        dist.broadcast(flat, src=0)
    return _cut(flat, tensors)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in tensors.values()])


def _cut(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([value.numel() for value in like.values()])
    return {name: part.view_as(value) for part, (name, value) in zip(parts, like.items(), strict=True)}


@contextmanager
def _all_alive() -> Iterator[None]:
    """Say what a failed exchange means; the backend only reports a closed connection or a timeout."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"Process {dist.get_rank()} of {dist.get_world_size()} waited for the others in vain ({error}): one of "
            "them has ended or hangs, so this run stops here. Nothing of the unfinished step has been released, and "
            "what was charged stays charged. The cause is in the output of the process that ended first."
        ) from error


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
