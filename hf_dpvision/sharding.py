"""A model whose parameters are spread over processes by torch's FSDP2, and what the interception has to know of it.

FSDP2 gathers the parameters of one block when the block runs, forward and backward, and reduces its gradients when its
backward pass is done. The clipped sums enter there: they are put where the gradients of the gathered parameters are
expected, and FSDP2 adds them up over the processes and keeps each process's part. No process ever holds all sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Follower(Protocol):
    """Whoever has to know what FSDP2 exchanges behind the back of torch functions."""

    def gathered(self, name: str, parameter: nn.Parameter) -> None:
        """Learn what stands for the sharded parameter `name` while its block runs."""

    def replaced(self, tensor: Tensor, by: Tensor) -> None:
        """Treat `by` as `tensor`."""

    def of_parameters(self, tensor: Tensor) -> bool:
        """Whether `tensor` is computed from trainable parameters alone."""


def shard(model: nn.Module, blocks: Iterable[nn.Module], *, reshard_after_forward: bool, device_type: str) -> None:
    """Spread the parameters of `model` over all processes, in place; each of `blocks` is gathered as one.

    Gradients are summed over the processes, in the type of the parameters, and never averaged: they are sums over
    examples, divided by the expected batch size once noise has been added.

    Args:
        model: becomes an `FSDPModule`; all processes must have the same weights.
        blocks: modules inside, none within another.
        reshard_after_forward: free the gathered parameters of a block between its forward and its backward pass.
        device_type: where the shards live, `"cuda"` or `"cpu"`.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> dict[FSDPModule, str]:
    """The modules whose parameters are gathered together, with their names, the model among them; else none."""
    return {module: name for name, module in model.named_modules() if isinstance(module, FSDPModule)}


@contextmanager
def followed(model: nn.Module, follower: Follower) -> Iterator[None]:
    """Inside, `follower` is told what FSDP2 puts in place of parameters and of the tensors a block is called with.

    The latter it replaces to notice when the gradients of a block's inputs are complete.
    """
    names = sharded_modules(model)
    called_with: list[list[Any]] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given, layout = tree_flatten((args, kwargs))
        called_with.append(given)
        # kept from FSDP2, which would give them an ordinary gradient, be it zero
        shown = [v.detach() if isinstance(v, Tensor) and follower.of_parameters(v) else v for v in given]
        return tree_unflatten(shown, layout)

    def after(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        received, layout = tree_flatten((args, kwargs))
        for i, (old, new) in enumerate(zip(called_with.pop(), received, strict=True)):
            if isinstance(old, Tensor) and follower.of_parameters(old):
                received[i] = old
            elif isinstance(old, Tensor) and old is not new:
                follower.replaced(old, new)
        for name, parameter in module.named_parameters(names[module]):
            if not isinstance(parameter, DTensor) and parameter.requires_grad:
                follower.gathered(name, parameter)
        return tree_unflatten(received, layout)

    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_pre_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
