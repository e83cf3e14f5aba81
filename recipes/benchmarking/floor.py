"""Why a step does not cost less: operations and bytes that cannot be avoided, and where the time of both steps goes.

Operations are those of matrix products and convolutions, two per multiplication, as torch's counter has them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_dpvision.capture import capture
from hf_dpvision.collector import clusters
from hf_dpvision.rules import rule_for
from hf_dpvision.rules.affine import AffineShape
from hf_dpvision.rules.cost import Choice, NormRule, allowed, held
from hf_dpvision.rules.planner import Planner, non_private_peak, private_peak
from hf_dpvision.rules.shared import shapes

from .sides import Batch, Side, per_example_loss


PROFILED = 3  # steps of each side; of each kind of operator the shortest time is shown, for other work only adds

PRODUCTS, ATTENTION = "matrix products", "attention kernels"
FORWARD, BACKWARD = "convolutions, forward", "convolutions, backward"
NORMS, MOVES = "norm layers", "allocation, copies"
ELEMENTWISE, REST = "element-wise, sums", "Python, views, autograd"
KINDS = (PRODUCTS, ATTENTION, FORWARD, BACKWARD, NORMS, ELEMENTWISE, MOVES, REST)

_NAMES = {
    PRODUCTS: "mm addmm addmm_ bmm baddbmm baddbmm_ mv addmv addmv_ dot matmul linear addbmm einsum",
    MOVES: "copy_ clone contiguous empty empty_strided empty_like new_empty new_empty_strided resize_ fill_ zero_ "
    "zeros zeros_like new_zeros ones ones_like full full_like cat stack _to_copy to repeat repeat_interleave",
    REST: "view _unsafe_view reshape _reshape_alias as_strided as_strided_ slice select narrow split split_with_sizes "
    "chunk unbind permute transpose t squeeze unsqueeze expand expand_as flatten unflatten detach detach_ alias "
    "diagonal unfold item _local_scalar_dense is_nonzero result_type set_ resolve_conj lift_fresh",
}
_KIND_OF = {f"aten::{name}": kind for kind, names in _NAMES.items() for name in names.split()}


@dataclass(frozen=True)
class Operations:
    """Floating point operations of a whole batch in products and convolutions.

    Attributes:
        non_private: of the step that trains everything.
        same_parameters: of the ordinary step that trains the same parameters as ours.
        counted: of our step, as torch counts them.
        gram, instantiation, sums: beyond `same_parameters`, by our plan: Gram matrices, gradients instantiated for the
            norm only, weighted sums of kept gradients (which torch's counter leaves out).
        least: beyond `same_parameters`, at least.
    """

    non_private: int
    same_parameters: int
    counted: int
    gram: int
    instantiation: int
    sums: int
    least: int

    @property
    def planned_ratio(self) -> float:
        """Of our plan to the non-private step."""
        return (self.same_parameters + self.gram + self.instantiation + self.sums) / self.non_private

    @property
    def least_ratio(self) -> float:
        """Of the least to the non-private step."""
        return (self.same_parameters + self.least) / self.non_private


@dataclass(frozen=True)
class Bytes:
    """Estimates from the sizes of tensors, as the planner's, without workspaces of kernels.

    Attributes:
        non_private: peak of the step that trains everything.
        saved: what our forward pass saves.
        sums: the sums of all trained tensors.
        operands, kept: held by our plan for the sums: activations with output gradients, gradients of single examples.
        planned: peak by our plan.
        least: peak if every use held as little as it can, in one pass.
    """

    non_private: int
    saved: int
    sums: int
    operands: int
    kept: int
    planned: int
    least: int


@dataclass(frozen=True)
class Reasons:
    """All of it.

    Attributes:
        profile: by kind of operator, seconds of the non-private step and of ours; empty on other devices than the CPU.
    """

    operations: Operations
    memory: Bytes
    profile: dict[str, tuple[float, float]] = field(default_factory=dict)


def reasons(base: nn.Module, model: nn.Module, plain: Side, ours: Side, batch: Batch) -> Reasons:
    """Count, estimate and profile; `base` trains everything, `model` what the case says, the sides are prepared."""
    n, device = len(batch["y"]), batch["y"].device
    base_slots, base_saved = used(base, batch, n)
    slots, saved = used(model, batch, n)
    plan = Planner().plan(slots, n, NormRule.AUTO, 1, saved)
    sizes = shapes(slots)
    least = {slot: min(allowed(1), key=lambda choice: held(choice, shape)) for slot, shape in sizes.items()}
    extra = Counter[Choice]()
    holding = Counter[bool]()
    for slot, choice in plan.choices.items():
        extra[choice] += n * planned_operations(choice, sizes[slot])
        holding[choice is Choice.KEEP] += 4 * n * held(choice, sizes[slot]) * (plan.backward_passes == 1)
    operations = Operations(
        counted(lambda: plain.step(batch)),
        counted(lambda: per_example_loss(model, batch).sum().backward()),
        counted(lambda: ours.step(batch)),
        extra[Choice.GHOST], extra[Choice.DROP], extra[Choice.KEEP],
        n * sum(map(least_operations, sizes.values())),
    )  # fmt: skip
    model.zero_grad(set_to_none=True)
    memory = Bytes(
        round(non_private_peak(base_slots, n, base_saved)), saved, sum(slot.theta.tensor.nbytes for slot in slots),
        holding[False], holding[True],
        round(private_peak(slots, plan.choices, n, saved)) if plan.backward_passes == 1 else saved,
        round(private_peak(slots, least, n, saved)),
    )  # fmt: skip
    return Reasons(operations, memory, profiled(plain, ours, batch) if device.type == "cpu" else {})


def used(model: nn.Module, batch: Batch, n: int) -> tuple[list[Any], int]:
    """The uses of a forward pass that have a tensor of their own, in order, and the bytes that it saves."""
    with capture(model, batch, n, rule_for) as forward:
        losses = per_example_loss(model, batch)
    saved = forward.interception.saved_bytes()
    del losses  # until here it kept alive what the backward pass needs
    groups = clusters(forward.uses.slots)
    return [members[0] for members in groups if len(members) == 1 and members[0].theta.isometric], saved


def planned_operations(choice: Choice, shape: AffineShape) -> int:
    """Of one example, beyond its share of an ordinary weight gradient."""
    by_choice = {Choice.GHOST: shape.gram_flops, Choice.DROP: shape.flops, Choice.KEEP: 2 * shape.weight_elements}
    return by_choice[choice]


def least_operations(shape: AffineShape) -> int:
    """Of one example, at least: half of both symmetric Gram matrices, the gradient once more, or the sum of gradients
    that are kept, where these are no more than activation and output gradient."""
    inputs = shape.inputs if shape.gram_inputs is None else shape.gram_inputs
    half = int(shape.gram_elements / 2 * (inputs / shape.readers + shape.outputs))
    kept = [2 * shape.weight_elements] if shape.weight_elements <= shape.operand_elements else []
    return min(half, shape.flops, *kept)


def counted(step: Callable[[], object]) -> int:
    """Operations of one call, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def profiled(plain: Side, ours: Side, batch: Batch) -> dict[str, tuple[float, float]]:
    """Seconds by kind of operator, of each the least of some steps of each side, in turns."""
    runs: dict[str, list[dict[str, float]]] = {plain.name: [], ours.name: []}
    for side in (plain, ours) * PROFILED:
        runs[side.name].append(profiled_once(lambda side=side: side.step(batch)))
    return {kind: tuple(min(run[kind] for run in taken) for taken in runs.values()) for kind in KINDS}


def profiled_once(step: Callable[[], object]) -> dict[str, float]:
    """Seconds by kind of operator in one call: self time of operators, and what no operator accounts for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        step()
        whole = time.perf_counter() - start
    by_name = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    return by_kind(by_name, whole)


def by_kind(by_name: Mapping[str, float], whole: float) -> dict[str, float]:
    """Sum the seconds of operators by kind; what is missing to `whole` was spent outside of them."""
    found = dict.fromkeys(KINDS, 0.0)
    for name, seconds in by_name.items():
        found[kind_of(name)] += seconds
    found[REST] += max(0.0, whole - sum(by_name.values()))
    return found


def kind_of(name: str) -> str:
    """The kind of an operator of the profiler, by its name."""
    if not name.startswith("aten::"):
        return REST
    if "conv" in name and "resolve" not in name:
        return BACKWARD if "backward" in name else FORWARD
    if "attention" in name:
        return ATTENTION
    if any(norm in name for norm in ("layer_norm", "group_norm", "batch_norm", "rms_norm")):
        return NORMS
    return _KIND_OF.get(name, ELEMENTWISE)


def largest(kinds: Mapping[str, tuple[float, float]], count: int) -> Sequence[tuple[str, float]]:
    """The kinds in which ours takes most beyond the non-private step, in shares of that step."""
    whole = sum(plain for plain, _ in kinds.values())
    differences = [(kind, (ours - plain) / whole) for kind, (plain, ours) in kinds.items()]
    return sorted(differences, key=lambda pair: -pair[1])[:count]
