"""What crosses processes: the sampling key, the ledger and the weights once, the sums once per logical step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


def same_key(key: bytes, device: torch.device) -> bytes:
    """Return the key of rank 0, on every process; with one process, `key` itself."""
    if not _several():
        return key
    shared = torch.tensor(list(key), dtype=torch.uint8, device=device)
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


def same_weights(model: nn.Module) -> None:
    """Overwrite parameters and buffers with those of rank 0."""
    if _several():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, src=0)


def total(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums over all processes, bit-identical on each of them, in one reduction."""
    if not _several():
        return dict(sums)
    flat = torch.cat([value.reshape(-1) for value in sums.values()])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in sums.values()])
    return {name: part.view_as(value) for part, (name, value) in zip(parts, sums.items(), strict=True)}


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
