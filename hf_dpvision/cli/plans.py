"""`hf-dpvision inspect`: the plan for the per-example gradient norms of a model."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from ..errors import ArgumentRefused
from .commands import Answer, add_command


_INSPECT_HELP = """\
The plan for the per-example gradient norms of a model. Per use of a trainable tensor: its sizes, ghost or
instantiate, and the memory and time that this needs. Weights are random, because only sizes matter.

examples:
  hf-dpvision inspect timm/vgg11 --image-size 224
  hf-dpvision inspect timm/deit_tiny_patch16_224 --norm-rule mixed --json
  hf-dpvision inspect timm/vit_small_patch16_224 --measure
"""


def register(commands: Any) -> None:
    """Add the command."""
    inspect = add_command(commands, "inspect", _INSPECT_HELP, _inspect, "looking at the model")
    inspect.add_argument("model", help="timm/<name>, a Hub id, or a local folder")
    inspect.add_argument("--image-size", type=int, default=224, help="pixels a side (default %(default)s)")
    inspect.add_argument(
        "--norm-rule", choices=("auto", "mixed", "ghost", "instantiate"), default="auto",
        help="auto: our cost model; mixed: the memory rule of Bu, Mao, Xu 2022 (default %(default)s)",
    )  # fmt: skip
    inspect.add_argument("--measure", action="store_true", help="also run and time both steps on random images")


def _inspect(arguments: argparse.Namespace) -> Answer:
    if arguments.image_size < 1:
        raise ArgumentRefused(f"--image-size {arguments.image_size}: an image has at least one pixel a side.")
    # here: it loads torch and the model libraries
    from ..inspect import format_plan, format_price, inspect_model, measure_model

    rows = inspect_model(arguments.model, arguments.image_size, arguments.norm_rule)
    text, price = format_plan(rows), None
    if arguments.measure:
        price = measure_model(arguments.model, arguments.image_size, arguments.norm_rule)
        text += f"\n{format_price(price)}"
    report = {
        "model": arguments.model,
        "image_size": arguments.image_size,
        "norm_rule": arguments.norm_rule,
        "uses": [asdict(row) for row in rows],
        "measured": None if price is None else asdict(price),
    }
    return Answer(report, text)
