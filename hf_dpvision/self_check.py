"""Before training: does the clipping of this very model equal a loop over single examples?

Turns "we think this model is supported" into "this model was checked". It runs on random inputs only: a verdict on
private images would depend on them and would have to be paid for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .clipping import Clipping, Flat
from .comparison import Comparison, Deterministic, compare_with_loop
from .dpsgd import Batch, PerExampleLoss, add_clipped_gradient_to_shards, clipped_gradient
from .errors import MixingRefused, ModelRefused
from .rules.cost import NormRule
from .sharding import gathered_gradients


_FLAT = Flat(1.0)
_LARGER = (
    "Parameters are probably used while their block does not run: name larger blocks in "
    "fsdp_config['transformer_layer_cls_to_wrap'], or leave fsdp off."
)


def self_check(
    model: nn.Module,
    per_example_loss: PerExampleLoss,
    batch: Batch,
    *,
    clipping: Clipping = _FLAT,
    norm_rule: NormRule | str = NormRule.AUTO,
    backward_passes: int = 1,
    rows: int = 1,
    tolerance: float = 1e-3,
) -> float:
    """Refuse a model whose clipped gradients differ from a loop over single examples; see `compare_with_loop`.

    Args:
        model: checked as it is (training or evaluation mode), never written to.
        per_example_loss: as for `clipped_gradient`.
        batch: two or three *random* examples of the data's shape.
        clipping: as for training.
        norm_rule: as for training, so that the kernels that will run are the ones that are checked.
        backward_passes: as for training.
        rows: of `batch` that make one example, as for `clipped_gradient`.
        tolerance: largest relative error allowed, of any norm and of the clipped sum.

    Returns:
        The largest relative error seen.

    Guarantee: on this batch no path leads from the loss of the first or last example to the rows of another one, not
    even one that carries a billionth.

    Edge cases: a gradient of exactly zero on both sides agrees.

    Raises:
        ModelRefused: the two disagree, a forward pass changes a buffer, or one example could contribute more than
            `clipping.sensitivity()`.
        MixingRefused: an example's gradient depends on the other examples.
        CaptureError: a trainable parameter escapes the interception.
    """
    found = compare_with_loop(
        model, per_example_loss, batch, clipping=clipping, norm_rule=norm_rule, backward_passes=backward_passes,
        rows=rows,
    )
    _refuse(found, type(model).__name__, tolerance)
    return found.error


def _refuse(found: Comparison, model: str, tolerance: float) -> None:
    """Raise for what was found of the model called `model`, if it cannot be trained with."""
    if found.changed:
        raise ModelRefused(
            f"a forward pass of {model} in training mode changes buffer(s) {found.changed[:8]}: they would be "
            "computed from private images and released without noise. Put those modules in eval mode, or load the "
            "model with replace_batchnorm='freeze' or 'group'."
        )
    if found.mixed:
        raise MixingRefused(
            f"{model}: the loss of one example reaches the rows of another one at parameter(s) {found.mixed[:4]}. "
            "Either an operation lets examples influence one another, or the examples are not kept one after another "
            "in dimension 0; then clipping bounds nothing. Remove that operation, or freeze the parameters it reaches "
            "with requires_grad_(False)."
        )
    if not found.error <= tolerance:
        raise MixingRefused(
            f"{model}: clipped gradients differ from a loop over single examples by {found.error:.1e} (at most "
            f"{tolerance:.0e} is allowed), most of all for {found.worst[:4]}: an operation lets examples influence "
            "one another, or is not covered, and clipping bounds nothing. Remove it, or freeze the parameters it "
            "reaches with requires_grad_(False)."
        )


@contextmanager
def checked_sharding(
    model: nn.Module,
    per_example_loss: PerExampleLoss,
    batch: Mapping[str, Any],
    *,
    device: torch.device,
    clipping: Clipping = _FLAT,
    norm_rule: NormRule | str = NormRule.AUTO,
    rows: int = 1,
    tolerance: float = 1e-3,
) -> Iterator[None]:
    """Shard the model inside this block: on leaving it, clipped gradients must be what they were before.

    Args:
        model: whole at first, sharded at the end, with its parameters as they were. Every process takes part.
        per_example_loss, clipping, norm_rule, rows, tolerance: as for `self_check`.
        batch: random examples, the same on every process, where the whole model is.
        device: where the shards are.

    Raises:
        ModelRefused: the two disagree, for example because a block's parameters are used while it does not run.
    """
    with Deterministic():
        whole = clipped_gradient(
            model, per_example_loss, batch, clipping=clipping, norm_rule=norm_rule, rows=rows
        ).gradients
    yield
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    try:
        with Deterministic():
            add_clipped_gradient_to_shards(
                model, per_example_loss, moved, clipping=clipping, norm_rule=norm_rule, rows=rows
            )
    except RuntimeError as error:
        raise ModelRefused(f"{type(model).__name__} cannot be spread over processes: {error} {_LARGER}") from error
    total = gathered_gradients(model)
    model.zero_grad()
    processes = dist.get_world_size()  # each of which has added the same
    errors = {name: (total[name] / processes - grad).double().norm() for name, grad in whole.items()}
    scale = get_total_norm([grad.double() for grad in whole.values()]).clamp(min=1e-30)
    difference = float(get_total_norm(errors.values()) / scale)
    if not difference <= tolerance:
        worst = sorted(errors, key=lambda name: float(errors[name]), reverse=True)[:4]
        raise ModelRefused(
            f"{type(model).__name__}: spread over {processes} processes its clipped gradients differ by "
            f"{difference:.1e} from before (at most {tolerance:.0e} is allowed), most of all for {worst}. {_LARGER}"
        )
