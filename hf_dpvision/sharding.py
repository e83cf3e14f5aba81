"""A model whose parameters are spread over processes by torch's FSDP2, and what the interception has to know of it.

FSDP2 gathers the parameters of one block when the block runs, forward and backward, and reduces its gradients when its
backward pass is done. The clipped sums enter there: they are put where the gradients of the gathered parameters are
expected, and FSDP2 adds them up over the processes and keeps each process's part. No process ever holds all sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .errors import ModelRefused
from .trained import trained_parameters


# An item of a list of modules with more than this part of all parameters is cut further, if it can be.
_LARGE = 8


class Follower(Protocol):
    """Whoever has to know what FSDP2 exchanges behind the back of torch functions."""

    def gathered(self, name: str, parameter: nn.Parameter) -> None:
        """Learn what stands for the sharded parameter `name` while its block runs."""

    def replaced(self, tensor: Tensor, by: Tensor) -> None:
        """Treat `by` as `tensor`."""

    def of_parameters(self, tensor: Tensor) -> bool:
        """Whether `tensor` is computed from trainable parameters alone."""


@dataclass(frozen=True)
class Sharding:
    """How a model is cut into blocks that are gathered as one.

    Args:
        block_classes: class names of the blocks; without any, the items of the model's lists of modules are the
            blocks, and those of the lists inside where an item holds more than an eighth of all parameters.
        reshard_after_forward: free the gathered parameters of a block between its forward and its backward pass.
    """

    block_classes: tuple[str, ...] = ()
    reshard_after_forward: bool = True

    def apply(self, model: nn.Module, device_type: str) -> None:
        """Spread the parameters of `model` over all processes, in place; it becomes an `FSDPModule`.

        Gradients are summed over the processes, in the type of the parameters, and never averaged: they are sums over
        examples, divided by the expected batch size once noise has been added.

        Args:
            model: all processes must have the same weights.
            device_type: where the shards live, `"cuda"` or `"cpu"`.

        Raises:
            ModelRefused: the model has no block of a class that was named.
        """
        mesh = init_device_mesh(device_type, (dist.get_world_size(),))
        for block in self.blocks(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model, mesh=mesh)
        for module in sharded_modules(model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The modules of `model` that are gathered as one, none within another; what is left is gathered with it.

        Raises:
            ModelRefused: the model has no block of a class that was named.
        """
        if not self.block_classes:
            total = sum(parameter.numel() for parameter in model.parameters())
            return list(_items_of_lists(model, total / _LARGE))
        classes = {type(module).__name__ for module in model.modules()}
        if missing := sorted(set(self.block_classes) - classes):
            raise ModelRefused(
                f"fsdp_config names the class(es) {missing}, of which {type(model).__name__} has no module. Name "
                "classes of its blocks in transformer_layer_cls_to_wrap, or leave it out."
            )
        return list(_outermost(model, lambda module: type(module).__name__ in self.block_classes))


def _items_of_lists(module: nn.Module, large: float) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from _items_of_lists(child, large)
            continue
        for item in child.children():
            inner = list(_items_of_lists(item, large))
            size = sum(parameter.numel() for parameter in item.parameters())
            if isinstance(item, (nn.ModuleList, nn.ModuleDict)) or (inner and size > large):
                yield from inner
            elif size:
                yield item


def _outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    for child in module.children():
        if wanted(child):
            yield child
        else:
            yield from _outermost(child, wanted)


def is_sharded(model: nn.Module) -> bool:
    """Whether `Sharding.apply` was called on it."""
    return isinstance(model, FSDPModule)


def local_gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """This process's shard of every parameter's gradient, float32 or better; zeros where there is none yet."""
    return {
        name: torch.zeros_like(local_part(parameter)) if parameter.grad is None else local_part(parameter.grad)
        for name, parameter in parameters.items()
    }


def gathered_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter's whole gradient on the CPU, zeros where there is none; every process has to ask."""
    return {
        name: whole(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, parameter in trained_parameters(model).items()
    }


def as_shard(local: Tensor, like: Tensor) -> Tensor:
    """`local`, this process's part, as `like` is: as a sharded tensor of its global shape, if that is sharded."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor on the CPU; of a sharded one every process has to ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.cpu().clone()


def shard_of(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, the same on every process, as `parameter` is: this process's shard of it, or all of it."""
    return _shard_of(value, parameter) if isinstance(parameter, DTensor) else value


def free_gathered(model: nn.Module) -> None:
    """Free what FSDP2 has gathered for a forward pass, so that it gathers anew after a shard was changed by hand."""
    for module in sharded_modules(model):
        module.reshard()


def full_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The whole state of a sharded model on the CPU of the first process, empty on the others; None if not sharded.

    Every process has to ask for it.
    """
    if not is_sharded(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


@contextmanager
def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, `optimizer.state_dict()` returns whole tensors and `load_state_dict()` takes them, as without shards.

    So a checkpoint does not depend on the number of processes. Every process has to enter it, since all of them are
    asked for their shards then; nothing happens if the model is not sharded.
    """
    if not is_sharded(model):
        yield
        return
    gathered = tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), optimizer.state_dict())

    def in_shards(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        shards = {
            index: {key: _shard_of(value, parameters[index]) for key, value in state.items()}
            for index, state in state_dict["state"].items()
        }
        return state_dict | {"state": shards}

    saving = optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: gathered)
    loading = optimizer.register_load_state_dict_pre_hook(in_shards)
    try:
        yield
    finally:
        saving.remove()
        loading.remove()


def _shard_of(value: Any, parameter: DTensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.ndim == 0:
        return value  # a step count, for example
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters are gathered together, the model among them; else none."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def followed(model: nn.Module, follower: Follower) -> Iterator[None]:
    """Inside, `follower` is told what FSDP2 puts in place of parameters and of the tensors a block is called with.

    The latter it replaces to notice when the gradients of a block's inputs are complete.
    """
    names = {module: name for name, module in model.named_modules() if is_sharded(module)}
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
