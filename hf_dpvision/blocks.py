"""The blocks of a vision model in order, found by how it is put together, not by what its parts are called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .errors import ModelRefused


_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Block:
    """One block: its qualified name and the module."""

    name: str
    module: nn.Module


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the blocks of a model in the order in which they are registered.

    A block is an item of a list (`ModuleList` or `Sequential`) whose items are all made of further modules: a
    transformer layer, a residual block. Where every item of a list has such a list inside, as a stage has, the items
    inside are the blocks. Lists of plain layers (stems, downsampling, a small network inside a block) do not count.

    Edge cases: a model without such lists has none.

    Raises:
        ModelRefused: a list has single modules beside lists of modules, so that one cannot tell which are the blocks.
    """
    return list(_inside("", model, stages=True))


def _inside(name: str, module: nn.Module, stages: bool) -> Iterator[Block]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        found = _of_list if isinstance(child, _LISTS) else _inside
        yield from found(path, child, stages)


def _of_list(name: str, items: nn.Module, stages: bool) -> Iterator[Block]:
    blocks = [
        Block(f"{name}.{item_name}", item)
        for item_name, item in items.named_children()
        if next(item.parameters(), None) is not None
    ]
    lists = [block for block in blocks if isinstance(block.module, _LISTS)]
    if lists and len(lists) < len(blocks):
        raise ModelRefused(
            f"The list {name!r} has single modules beside lists of modules, so that its blocks cannot be told apart. "
            "Choose the trained parameters by requires_grad_, with train_layers='all'."
        )
    if lists:
        for block in lists:
            yield from _of_list(block.name, block.module, stages)
        return
    if any(next(block.module.children(), None) is None for block in blocks):
        return  # plain layers
    inside = [list(_inside(block.name, block.module, stages=False)) for block in blocks] if stages else []
    if inside and all(inside):
        for found in inside:
            yield from found
    else:
        yield from blocks
