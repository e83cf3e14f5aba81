"""The plan: for every use of a trainable tensor its sizes, ghost or instantiate, and the price."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time

import torch
from torch import Tensor, nn

from .capture import Batch, capture
from .clipping import Flat
from .dpsgd import clipped_gradient
from .fitting import peak_bytes
from .rules import RULES, rule_for
from .rules.affine import AffineShape
from .rules.cost import Choice, NormRule, choose, extra_flops, extra_memory, held, non_private_seconds, seconds
from .rules.planner import Planner
from .rules.shared import shapes
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
        extra_seconds: modelled time per example beyond it; only its ratio to other times means something.
        held: numbers per example held for the clipped sum, with one backward pass.
        flops: floating point operations of one example's gradient, a third of the non-private step's for this use.
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
    extra_seconds: float
    held: int
    flops: int

    @property
    def ghost_numbers(self) -> int:
        """Numbers per example in both Gram matrices, 2 g t^2; 0 where the use is always instantiated."""
        return 0 if self.groups is None or self.positions is None else 2 * self.groups * self.positions**2

    @property
    def gradient_numbers(self) -> int:
        """Numbers per example in an instantiated gradient, g d p; 0 likewise."""
        sizes = (self.groups, self.inputs, self.outputs)
        return math.prod(size or 0 for size in sizes)


def plan(model: nn.Module, batch: Batch, n: int, norm_rule: NormRule, backward_passes: int = 1) -> list[PlannedUse]:
    """The planned uses of one forward pass of `model(**batch)`, in order; private data is not needed, only shapes."""
    with capture(model, batch, n, rule_for) as forward:
        output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    slots = forward.uses.slots
    saved = forward.interception.saved_bytes()
    del output  # until here it kept alive what a backward pass would need
    choices = Planner().plan(slots, n, norm_rule, backward_passes, saved).choices
    unshaped = choose(norm_rule, None, backward_passes)
    sizes = shapes(slots)
    return [_planned(slot, sizes.get(slot), choices.get(slot, unshaped), backward_passes) for slot in slots]


def _planned(slot: Slot, shape: AffineShape | None, choice: Choice, backward_passes: int) -> PlannedUse:
    elements = slot.theta.tensor.numel()
    paper = "ghost" if choose(NormRule.MIXED, shape, backward_passes) is Choice.GHOST else "instantiate"
    return PlannedUse(
        parameter="+".join(sorted(slot.theta.sources)),
        operation=slot.operation,
        generic=slot.generic,
        positions=None if shape is None else shape.positions,
        inputs=None if shape is None else shape.inputs,
        outputs=None if shape is None else shape.outputs,
        groups=None if shape is None else shape.groups,
        paper=paper,
        choice=choice.value,
        extra_memory=elements if shape is None else extra_memory(choice, shape),
        extra_flops=0 if shape is None else extra_flops(choice, shape),
        extra_seconds=0.0 if shape is None else seconds(choice, shape),
        held=elements if shape is None else held(choice, shape),
        flops=0 if shape is None else shape.flops,
    )


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


@dataclass(frozen=True)
class Price:
    """What a step costs, in seconds of processor time and bytes of peak memory.

    Attributes:
        seconds, peak_bytes: of the non-private step and of ours, beyond the parameters.
    """

    seconds: tuple[float, float]
    peak_bytes: tuple[int, int]


def measure_model(model_name: str, image_size: int, norm_rule: str = "auto", n: int = 8) -> Price:
    """Time and memory of the non-private step and of ours, on `n` random images; no optimizer, no noise.

    The steps take turns, the median of five rounds counts; the first round does not.

    Raises:
        As `inspect_model`.
    """
    from .models import load_model

    model = load_model(model_name, pretrained=False, image_size=image_size, replace_batchnorm="freeze").eval()
    batch = {"pixel_values": torch.randn(n, 3, image_size, image_size)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    planner = Planner(measure=torch.accelerator.is_available())  # as training does

    def non_private() -> None:
        torch.autograd.grad(_losses(model, batch).sum(), trained, allow_unused=True)

    def ours() -> None:
        clipped_gradient(model, _losses, batch, clipping=Flat(1.0), norm_rule=norm_rule, planner=planner)

    rounds = [[_spent(step) for step in (non_private, ours)] for _ in range(6)][1:]
    cpu = torch.device("cpu")
    times = tuple(median(times) for times in zip(*rounds, strict=True))
    return Price(times, (peak_bytes(non_private, cpu), peak_bytes(ours, cpu)))


def images_per_second(model_name: str, image_size: int, n: int = 8) -> float:
    """How many random images our step works through in a second of the clock, here, on an accelerator if there is one.

    All parameters are trained, in float32. Loading of images, noise and the optimizer are not in it; the noise and the
    optimizer count once per logical batch. The median of three rounds of `n` images counts, after one that does not.

    Raises:
        As `inspect_model`.
    """
    from .models import load_model

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model: nn.Module = load_model(model_name, pretrained=False, image_size=image_size, replace_batchnorm="freeze")
    model.to(device)
    batch = {"pixel_values": torch.randn(n, 3, image_size, image_size, device=device)}
    planner, times = Planner(measure=torch.accelerator.is_available()), []
    for _ in range(4):
        start = perf_counter()
        clipped_gradient(model, _losses, batch, clipping=Flat(1.0), planner=planner)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(perf_counter() - start)
    return n / median(times[1:])


def _losses(module: nn.Module, images: Mapping[str, Tensor]) -> Tensor:
    output = module(**images)
    return torch.logsumexp(output if isinstance(output, Tensor) else output.logits, dim=-1)


def _spent(step: Callable[[], None]) -> float:
    start = process_time()
    step()
    return process_time() - start


def format_price(price: Price) -> str:
    """Measured time and memory, and the ratio to the non-private step, in two lines."""
    (plain, ours), (plain_bytes, our_bytes) = price.seconds, price.peak_bytes
    return (
        f"Measured time: {plain:.3f} s without privacy, {ours:.3f} s with it (ratio {ours / plain:.2f}).\n"
        f"Measured peak memory: {plain_bytes / 2**20:.0f} MiB without privacy, {our_bytes / 2**20:.0f} MiB with it "
        f"(ratio {our_bytes / plain_bytes:.2f})."
    )


def format_plan(rows: Sequence[PlannedUse]) -> str:
    """The plan as a table, with totals of what ghost, instantiation, the paper's rule and the plan need."""
    head = ("parameter", "operation", "t", "d", "p", "g", "2t^2", "pd", "paper's rule", "planned", "numbers/example",
            "MFLOP/example")  # fmt: skip
    table: list[Sequence[object]] = [head]
    for row in rows:
        sizes: Sequence[object] = ("",) * 6
        if row.positions is not None and row.groups is not None:
            gram, weight = row.ghost_numbers // row.groups, row.gradient_numbers // row.groups
            sizes = (row.positions, row.inputs, row.outputs, row.groups, f"{gram:.3g}", f"{weight:.3g}")
        operation = f"{row.operation} (generic: slow)" if row.generic else row.operation
        cost = (f"{row.extra_memory:.3g}", f"{row.extra_flops / 1e6:.3g}")
        table.append((row.parameter, operation, *sizes, row.paper if row.positions else "", row.choice, *cost))
    widths = [max(len(str(line[i])) for line in table) for i in range(len(head))]
    lines = ["  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", _totals(rows)])


def _totals(rows: Sequence[PlannedUse]) -> str:
    affine = [row for row in rows if row.positions is not None]
    ghost = sum(row.ghost_numbers for row in affine)
    weights = sum(row.gradient_numbers for row in affine)
    paper = sum(row.ghost_numbers if row.paper == "ghost" else row.gradient_numbers for row in affine)
    planned = sum(row.extra_memory for row in affine)
    extra = sum(row.extra_seconds for row in affine)
    plain = sum(non_private_seconds(row.flops) for row in affine)
    counts = ", ".join(f"{sum(row.choice == c.value for row in affine)} {c.value}" for c in Choice)
    return (
        f"{len(affine)} affine uses ({counts}), {len(rows) - len(affine)} small ones always instantiated.\n"
        f"Numbers per example for the norms: all ghost {ghost:.3g}, all instantiated {weights:.3g}, by the paper's "
        f"rule {paper:.3g}, as planned {planned:.3g}.\n"
        f"Predicted: {1 + extra / max(plain, 1e-30):.2f} times the non-private step's time in these uses; "
        f"{sum(row.held for row in rows):.3g} numbers per example held for the clipped sum.\n"
        f"Uses without a rule of their own: {sum(row.generic for row in rows)}; rules cover {len(RULES)} functions."
    )
