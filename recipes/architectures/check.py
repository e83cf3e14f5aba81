"""One architecture: our clipped gradients and norms beside a loop over single examples, every parameter trainable."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.utils import ModelOutput

from hf_dpvision import batchnorm
from hf_dpvision.capture import capture
from hf_dpvision.comparison import compare_with_loop
from hf_dpvision.errors import CaptureError, DataRefused, MixingRefused, ModelRefused, RefusedError
from hf_dpvision.rules import rule_for

from . import from_timm, from_transformers
from .reduction import Reduction


EXAMPLES = 2
NUM_CLASSES = 5
# Relative errors allowed in float64: of norms and of the sum, and of one parameter's sum.
TOLERANCE, OWN_TOLERANCE = 1e-9, 1e-6
# Larger than this the loop over single examples in float64 takes too long here.
MOST_PARAMETERS = 250_000_000
GROUP_NORM = " with GroupNorm"  # behind the name of an architecture that is checked in that way too
REFUSALS = (ModelRefused, MixingRefused, CaptureError, DataRefused, RefusedError)


@dataclass(frozen=True)
class Result:
    """What was found of one architecture.

    Attributes:
        name: of timm's registry, or `transformers/<class>`.
        family: module of timm, or `transformers`.
        status: "exact", "refused", "wrong", "error", "too large", "unavailable" or "not run".
        reason: for all but "exact", in words.
        parameters: of the model that was checked, all of them trainable.
        reduction: how far the architecture was reduced.
        image_size: in pixels.
        error: largest relative error of norms and of the clipped sum.
        batchnorm: what became of BatchNorm layers, None where there are none.
        generic: operations on trainable tensors that no rule of their own covers.
        same_as: an architecture whose reduced form is the same model, which was checked.
    """

    name: str
    family: str
    status: str
    reason: str | None = None
    parameters: int | None = None
    reduction: str | None = None
    image_size: int | None = None
    error: float | None = None
    batchnorm: str | None = None
    generic: tuple[str, ...] = ()
    same_as: str | None = None


class DoubleThroughout(TorchFunctionMode):
    """What a model would compute in float32, such as a norm or a softmax, it computes in float64 inside this block.

    Otherwise the comparison would only show the rounding of float32.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


class Unbuildable(Exception):
    """No way was found to build and run an architecture; the message has the first reason."""


def source(name: str) -> ModuleType:
    """The module that builds an architecture."""
    return from_transformers if name.startswith(from_transformers.PREFIX) else from_timm


def family(name: str) -> str:
    """The module of timm that an architecture comes from, or `transformers`."""
    name = name.removesuffix(GROUP_NORM)
    return "transformers" if name.startswith(from_transformers.PREFIX) else from_timm.family(name)


def all_names() -> list[str]:
    """Every architecture of timm and every image classifier of transformers."""
    return [*from_timm.names(), *sorted(from_transformers.classes())]


def example_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A loss of every example, `[n]`: cross-entropy over all outputs of a head, whatever their shape."""
    batch = dict(batch)
    labels = batch.pop("target")
    return sum(_loss(output, labels) for output in _outputs(model(**batch)))


def _loss(output: Tensor, labels: Tensor) -> Tensor:
    rows = output.flatten(1)
    return F.cross_entropy(rows, labels % rows.shape[1], reduction="none")


def _outputs(found: Any) -> Iterator[Tensor]:
    if isinstance(found, ModelOutput):
        # a model with a teacher gives the mean of two heads as well, which has nothing that they have not
        heads = [value for key, value in found.items() if "logits" in key and isinstance(value, Tensor)]
        yield from heads or _outputs(next(iter(found.values())))  # one has a head's output under another name
    elif isinstance(found, Tensor):
        if found.is_floating_point():
            yield found
    elif isinstance(found, (tuple, list)):
        for item in found:
            yield from _outputs(item)
    elif isinstance(found, dict):
        yield from _outputs(list(found.values()))


def built(name: str) -> tuple[nn.Module, int, Reduction]:
    """The smallest model of an architecture that can be built and run, its image size, and how it was reduced.

    Raises:
        Unbuildable: none could.
    """
    first: Exception | None = None
    for reduction in Reduction:
        for image_size in source(name).IMAGE_SIZES:
            try:
                torch.manual_seed(0)
                model = source(name).build(name, reduction, image_size, NUM_CLASSES)
                if sum(p.numel() for p in model.parameters()) <= MOST_PARAMETERS:
                    _try(model, name, image_size)
                return model, image_size, reduction
            except Exception as error:  # whatever an architecture raises where a size does not suit it
                first = first or error
                if isinstance(error, ImportError):
                    raise Unbuildable(str(error).strip().splitlines()[0]) from error
    raise Unbuildable(f"{type(first).__name__}: {first}")


def _try(model: nn.Module, name: str, image_size: int) -> None:
    batch = source(name).inputs(name, image_size, 2)
    with torch.no_grad():
        if not list(_outputs(model.train()(**batch))):
            raise Unbuildable("it returns no tensor of floating-point numbers")


def prepared(model: nn.Module, replacement: str) -> nn.Module:
    """In float64 and training mode, every parameter trainable, BatchNorm replaced, its statistics made up."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.copy_(0.75 + 0.5 * torch.rand(buffer.shape, generator=generator))
    replace = {"frozen": batchnorm.freeze, "group": batchnorm.to_group_norm}[replacement]
    model = batchnorm.replace_batchnorm(model, replace, with_activation=(BatchNormAct2d, SyncBatchNormAct))
    return model.double().train().requires_grad_(True)


def check(name: str, replacement: str = "frozen", title: str | None = None) -> Result:
    """Build, compare, and say what was found, as of `title`; `replacement` of BatchNorm is "frozen" or "group"."""
    warnings.simplefilter("ignore")
    title = title or name
    try:
        model, image_size, reduction = built(name)
    except Unbuildable as error:
        return Result(title, family(name), "unavailable" if _needs_package(error) else "error", _short(error))
    parameters = sum(p.numel() for p in model.parameters())
    about = {"parameters": parameters, "reduction": reduction.value, "image_size": image_size}
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        about["batchnorm"] = replacement
    if parameters > MOST_PARAMETERS:
        reason = f"{parameters:,} parameters, more than {MOST_PARAMETERS:,}, in the smallest form that was found"
        return Result(title, family(name), "too large", reason, **about)
    torch.manual_seed(2)
    batch = {k: _double(v) for k, v in source(name).inputs(name, image_size, EXAMPLES).items()}
    batch["target"] = torch.arange(EXAMPLES) % NUM_CLASSES
    with DoubleThroughout():
        try:
            model = prepared(model, replacement)
            status, reason, error = _compared(model, batch)
        except REFUSALS as refusal:
            return Result(title, family(name), "refused", _why(refusal, model, batch), **about)
        except RuntimeError as failure:
            return Result(title, family(name), "error", _short(failure), **about)
        return Result(title, family(name), status, reason, error=error, generic=_generic(model, batch), **about)


def _compared(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[str, str | None, float | None]:
    found = compare_with_loop(model, example_losses, batch)
    if found.changed:
        return "refused", f"a forward pass changes buffers: {found.changed[:2]}", None
    if found.mixed:
        where = f"at {len(found.mixed)} parameters, such as {found.mixed[0]}"
        share = _share(mixed_share(model, batch))
        return "refused", f"mixes examples: the loss of one reaches the rows of another {where}; {share}", None
    if not torch.isfinite(found.norms).all():
        return "error", "gradients are not finite, in the loop already", None
    if not found.error <= TOLERANCE or not (own := found.own_error()) <= OWN_TOLERANCE:
        reason = f"norms or sum differ by {found.error:.1e}, most in {found.worst[:3]}"
        return "wrong", reason, found.error
    return "exact", None, max(found.error, 1e-3 * own)


def _share(mixing: float) -> str:
    return f"others change a gradient by {mixing:.0e}" if mixing > TOLERANCE else "no gradient is changed by others"


def mixed_share(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """By how much, relative to its norm, the first example's gradient changes when the others are beside it."""
    parameters = list(model.parameters())

    def gradient(rows: list[int]) -> Tensor:
        torch.manual_seed(3)
        losses = example_losses(model, {key: value[rows] for key, value in batch.items()})
        found = torch.autograd.grad(losses[0], parameters, allow_unused=True)
        return torch.cat([
            torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten()
            for p, g in zip(parameters, found, strict=True)
        ])  # fmt: skip

    n = len(batch["target"])
    alone, beside = gradient([0] * n), gradient(list(range(n)))
    return float((beside - alone).norm() / alone.norm().clamp(min=1e-30))


def _why(refusal: Exception, model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    """Why a model is refused, and whether its examples really mix."""
    text = _short(refusal)
    if not isinstance(refusal, (MixingRefused, CaptureError)) or "BatchNorm" in text:
        return text
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    try:
        share = mixed_share(model, batch)
    except RuntimeError as error:
        return f"{text} (mixing could not be tested: {_short(error)})"
    return f"{text} ({_share(share)})"


def _generic(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[str, ...]:
    with capture(model, batch, EXAMPLES, rule_for) as forward:
        losses = example_losses(model, batch)
    del losses
    return tuple(sorted({slot.operation for slot in forward.uses.slots if slot.generic}))


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _needs_package(error: Exception) -> bool:
    return isinstance(error.__cause__, ImportError)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
