"""The plan: for every use of a trainable tensor its sizes, ghost or instantiate, and the price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .capture import Batch, capture
from .rules import RULES, rule_for
from .rules.cost import Choice, NormRule, choose, extra_flops, extra_memory
from .uses import Slot


@dataclass(frozen=True)
class PlannedUse:
    """One use of one trainable tensor.

    Attributes:
        parameter: qualified name; several joined by "+" where the tensor is computed from several.
        operation: the torch function.
        generic: no rule covers the operation; it is exact but slow.
        positions: `t`, None where the use is always instantiated.
        inputs: `d`.
        outputs: `p`.
        groups: `g`.
        paper: the choice of the paper's rule, "ghost" if 2 t^2 < p d, else "instantiate".
        choice: what is planned: "ghost", "keep" (instantiate and hold) or "drop" (instantiate for the norm only).
        extra_memory: float32 numbers held or needed per example for the norm, beyond the non-private step.
        extra_flops: floating point operations per example beyond the non-private step.
    """

    parameter: str
    operation: str
    generic: bool
    positions: int | None
    inputs: int | None
    outputs: int | None
    groups: int | None
    paper: str
    choice: str
    extra_memory: int
    extra_flops: int


def plan(model: nn.Module, batch: Batch, n: int, norm_rule: NormRule, backward_passes: int = 1) -> list[PlannedUse]:
    """The planned uses of one forward pass of `model(**batch)`, in order; private data is not needed, only shapes."""
    with capture(model, batch, n, rule_for) as forward:
        model(*batch) if isinstance(batch, (list, tuple)) else model(**batch)
    return [_planned(slot, norm_rule, backward_passes) for slot in forward.uses.slots]


def _planned(slot: Slot, norm_rule: NormRule, backward_passes: int) -> PlannedUse:
    choice = choose(norm_rule, slot.shape, backward_passes)
    elements = slot.theta.tensor.numel()
    sizes = (None,) * 4
    if slot.shape is not None:
        sizes = slot.shape.positions, slot.shape.inputs, slot.shape.outputs, slot.shape.groups
    paper = "ghost" if choose(NormRule.MIXED, slot.shape, backward_passes) is Choice.GHOST else "instantiate"
    return PlannedUse(
        "+".join(sorted(slot.theta.sources)), slot.operation, slot.generic, *sizes, paper, choice.value,
        elements if slot.shape is None else extra_memory(choice, slot.shape),
        0 if slot.shape is None else extra_flops(choice, slot.shape),
    )  # fmt: skip


def inspect_model(model_name: str, image_size: int, norm_rule: str = "mixed") -> list[PlannedUse]:
    """The plan of a timm or Hugging Face model for one random image `[1, 3, image_size, image_size]`.

    Weights are random: only sizes matter. BatchNorm counts as frozen.

    Raises:
        ModelRefused: the model is unknown, or an operation mixes examples.
        ArgumentRefused: `norm_rule` is unknown.
    """
    from .models import load_model  # here, so that nothing below needs timm or transformers

    model = load_model(model_name, pretrained=False, image_size=image_size, replace_batchnorm="freeze").eval()
    batch = {"pixel_values": torch.zeros(1, 3, image_size, image_size)}
    return plan(model, batch, 1, NormRule(norm_rule))


def format_plan(rows: Sequence[PlannedUse]) -> str:
    """The plan as a table, with totals of what ghost, instantiation, the paper's rule and the plan need."""
    head = ("parameter", "operation", "t", "d", "p", "g", "2t^2", "pd", "paper's rule", "planned", "numbers/example",
            "MFLOP/example")  # fmt: skip
    table = [head]
    for row in rows:
        if row.positions is None:
            sizes = ("", "", "", "", "", "")
        else:
            gram, weight = 2 * row.positions**2, row.inputs * row.outputs
            sizes = (row.positions, row.inputs, row.outputs, row.groups, f"{gram:.3g}", f"{weight:.3g}")
        operation = f"{row.operation} (generic: slow)" if row.generic else row.operation
        cost = (f"{row.extra_memory:.3g}", f"{row.extra_flops / 1e6:.3g}")
        table.append((row.parameter, operation, *sizes, row.paper if row.positions else "", row.choice, *cost))
    widths = [max(len(str(line[i])) for line in table) for i in range(len(head))]
    lines = ["  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", _totals(rows)])


def _totals(rows: Sequence[PlannedUse]) -> str:
    affine = [row for row in rows if row.positions is not None]
    ghost = sum(2 * row.groups * row.positions**2 for row in affine)
    weights = sum(row.groups * row.inputs * row.outputs for row in affine)
    paper = sum(
        2 * row.groups * row.positions**2 if row.paper == "ghost" else row.groups * row.inputs * row.outputs
        for row in affine
    )
    planned = sum(row.extra_memory for row in affine)
    counts = ", ".join(f"{sum(row.choice == c.value for row in affine)} {c.value}" for c in Choice)
    return (
        f"{len(affine)} affine uses ({counts}), {len(rows) - len(affine)} small ones always instantiated.\n"
        f"Numbers per example for the norms: all ghost {ghost:.3g}, all instantiated {weights:.3g}, by the paper's "
        f"rule {paper:.3g}, as planned {planned:.3g}.\n"
        f"Uses without a rule of their own: {sum(row.generic for row in rows)}; rules cover {len(RULES)} functions."
    )
