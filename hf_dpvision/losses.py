"""Losses of single examples, computed from the logits; never the model's own loss.

The loss inside a transformers model is a mean over the batch, and in some models is scaled by the number of
accumulation steps; neither can be clipped per example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ArgumentRefused, DataRefused, ModelRefused


Loss = Callable[[Tensor, Tensor, float], Tensor]

_IGNORED = -100  # cross entropy gives such a label loss 0 and gradient 0


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of what a model's forward returned: a tensor, a mapping with "logits", or a tuple.

    Raises:
        ModelRefused: none of these.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]
    if isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise ModelRefused(
        f"The model returned a {type(outputs).__name__} without logits, so no loss of single examples can be "
        "computed. Return the logits, or pass compute_loss_func(outputs, labels, num_items_in_batch), which returns "
        "shape [n]."
    )


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy `[n]` of logits `[n, k]` and class indices `[n]` (or probabilities `[n, k]`).

    Edge cases: an index outside `0 .. k - 1` gives loss 0 and gradient 0, so that one wrong label met during training
    neither stops the run, which would be seen, nor contributes.

    Raises:
        DataRefused: the labels are not one class index, or one probability per class, for each example.
    """
    if labels.is_floating_point():
        _refuse_label_shape(labels.shape == logits.shape, logits, labels, "one whole number per example")
    else:
        _refuse_label_shape(labels.numel() == logits.shape[0], logits, labels, "one whole number per example")
        labels = labels.reshape(-1).long()
        labels = torch.where((labels >= 0) & (labels < logits.shape[-1]), labels, _IGNORED)
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=_IGNORED, label_smoothing=smoothing)


def binary_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return, per example, the mean over classes of the binary cross entropy: `[n]` from `[n, k]` and `[n, k]`.

    Raises:
        DataRefused: the labels have another shape than the logits.
    """
    wanted = "one whole number per example, or 0 or 1 for every class"
    _refuse_label_shape(labels.shape == logits.shape, logits, labels, wanted)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").flatten(1).mean(1)


def squared_error(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return, per example, the mean over outputs of the squared error: `[n]` from `[n, k]` and `[n, k]` or `[n]`.

    Raises:
        DataRefused: there are not as many labels as outputs.
    """
    _refuse_label_shape(labels.numel() == logits.numel(), logits, labels, "one value per output")
    targets = labels.to(logits.dtype).reshape(logits.shape)
    return F.mse_loss(logits, targets, reduction="none").flatten(1).mean(1)


def _refuse_label_shape(fits: bool, logits: Tensor, labels: Tensor, wanted: str) -> None:
    if not fits:
        raise DataRefused(
            f"The labels of {logits.shape[0]} examples are {labels.dtype} of shape {tuple(labels.shape)}, and the "
            f"model has {logits.shape[-1]} outputs: this head needs {wanted}, or the loss would compare an example "
            "with another one's label. Convert the labels, or choose another head (config.problem_type, num_labels)."
        )


_BY_PROBLEM: dict[str, Loss] = {
    "single_label_classification": cross_entropy,
    "multi_label_classification": binary_cross_entropy,
    "regression": squared_error,
}


def example_losses(logits: Tensor, labels: Tensor, problem_type: str | None, smoothing: float = 0.0) -> Tensor:
    """Return one loss per example, `[n]`, as transformers' `problem_type` says, in float32 or better.

    Args:
        logits: `[n, k]`.
        labels: `[n]` class indices, `[n, k]` or `[n]` otherwise.
        problem_type: of the model's config; None is decided as in transformers: one output is a regression, whole
            numbers are classes, anything else is several labels at once.
        smoothing: label smoothing, for single-label classification only.

    Raises:
        ArgumentRefused: an unknown `problem_type`, or smoothing where it has no meaning.
    """
    if problem_type is None:
        problem_type = _guess(logits, labels)
    if problem_type not in _BY_PROBLEM:
        raise ArgumentRefused(
            f"config.problem_type={problem_type!r} has no per-example loss. Use one of {sorted(_BY_PROBLEM)}, or pass "
            "compute_loss_func(outputs, labels, num_items_in_batch), which returns shape [n]."
        )
    loss = _BY_PROBLEM[problem_type]
    if smoothing and loss is not cross_entropy:
        raise ArgumentRefused(
            f"label_smoothing_factor={smoothing} has no meaning for {problem_type}. Leave it at 0."
        )
    return loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, smoothing)


def _guess(logits: Tensor, labels: Tensor) -> str:
    if logits.shape[-1] == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def losses_of_rows_together(losses: Tensor, rows: int, views: int = 1, weights: Tensor | None = None) -> Tensor:
    """Return one loss for every `rows` adjacent rows: the sum over its examples of the mean over their views, `[n]`.

    Args:
        losses: one per row, `[n * rows]`; of another shape they are returned as they are, to be refused.
        rows: that make one unit, a multiple of `views`.
        views: adjacent rows of one example.
        weights: of each row, `[n * rows]`, 0 for one that only fills up; by default 1.
    """
    if losses.ndim != 1 or rows == 1 and weights is None:
        return losses
    weighted = losses if weights is None else losses * weights.to(losses.dtype)
    return weighted.view(-1, rows).sum(1) / views


def model_losses(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    label_name: str,
    problem_type: str | None,
    smoothing: float,
    compute_loss_func: Callable[..., Tensor] | None,
) -> tuple[Tensor, Mapping[str, Any]]:
    """Run the model without labels and return one loss per example `[n]`, and its outputs as a mapping with "logits".

    Args:
        model: called with every input but the labels, by name.
        inputs: collated examples.
        label_name: key of the labels.
        problem_type, smoothing: as for `example_losses`.
        compute_loss_func: the user's loss, called as `Trainer` does, instead of `example_losses`.

    Raises:
        ArgumentRefused: the user's loss does not return one loss per example.
        ModelRefused: the model returns no logits.
    """
    labels = inputs[label_name]
    outputs = model(**{name: value for name, value in inputs.items() if name != label_name})
    if compute_loss_func is None:
        losses = example_losses(logits_of(outputs), labels, problem_type, smoothing)
    else:
        losses = compute_loss_func(outputs, labels, num_items_in_batch=None)
        _check_user_losses(losses, labels.shape[0])
    return losses, outputs if isinstance(outputs, Mapping) else {"logits": logits_of(outputs)}


def _check_user_losses(losses: Any, count: int) -> None:
    found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if found != (count,):
        raise ArgumentRefused(
            f"compute_loss_func returned {found} for {count} examples: a mean or sum over the batch cannot be clipped "
            f"per example. Return one loss per example, shape [{count}]."
        )
