"""By how much rounding lets a contribution exceed its bound, and what noise costs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hf_dpvision.audit.rounding import clipping_excess
from hf_dpvision.noise import NoiseSource
from hf_dpvision.secure_noise import SecureNoiseSource

from .step import tiny_vit


ALLOWED_EXCESS = 1e-4


def convolutions() -> nn.Module:
    """Convolutions with a stride and with groups, GroupNorm, a linear layer; pictures `[n, 3, 16, 16]`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, groups=4),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 7 * 7, 2),
    )  # fmt: skip


def per_example_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, `[n]`."""
    outputs = model(batch["pixel_values"])
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def rounding_report(pictures: int = 16) -> list[str]:
    """The section of the report about rounding: the largest excess over the bound, over random pictures."""
    rows = []
    for name, build in (("ViT of two blocks", tiny_vit), ("convolutions", convolutions)):
        for precision, autocast in (("float32", None), ("bfloat16 autocast", torch.bfloat16)):
            for passes in (1, 2):
                found = [
                    max(_excesses(build(), pictures, rule, passes, autocast))
                    for rule in ("auto", "mixed", "ghost", "instantiate")
                ]
                if max(found) >= ALLOWED_EXCESS:
                    raise RuntimeError(f"{name}, {precision}, {passes} passes: a contribution is {max(found)} over C")
                cells = (name, precision, str(passes), *(f"{one:+.1e}" for one in found))
                rows.append(f"| {' | '.join(cells)} |")
    return [
        "## Rounding",
        "",
        f"The largest of (norm of one clipped contribution / C - 1) over {pictures} random pictures, faint to "
        "glaring, each with C at 0.9 and at 0.01 of its norm; negative where all stay below. Required: less than "
        f"{ALLOWED_EXCESS:g}. On the CPU; TF32, and the kernels of a CUDA device in any precision, were not run.",
        "",
        "| model | precision | backward passes | auto | mixed | ghost | instantiate |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
    ]


def _excesses(
    model: nn.Module, pictures: int, rule: str, passes: int, autocast: torch.dtype | None
) -> Iterator[float]:
    generator = torch.Generator().manual_seed(1)
    for number in range(pictures):
        pixels = torch.randn(1, 3, 16, 16, generator=generator) * 10.0 ** (number % 4 - 2)
        example = {"pixel_values": pixels, "labels": torch.tensor([number % 2])}
        yield clipping_excess(
            model, per_example_loss, example, norm_rule=rule, backward_passes=passes, autocast=autocast
        )


def noise_report(draws: int = 20_000_000) -> list[str]:
    """The section of the report about the speed of noise on one thread."""
    rows = []
    for name, source in (("default", NoiseSource.from_os_entropy()), ("secure_noise", SecureNoiseSource())):
        source.normal((draws // 10,), 1.0)
        started = time.process_time()  # of this one thread, whatever else the machine does
        source.normal((draws,), 1.0)
        rate = draws / (time.process_time() - started)
        rows.append(f"| {name} | {source.algorithm} | {rate / 1e6:.0f} | {86e6 / rate:.1f} s |")
    return [
        "## Speed of noise",
        "",
        "| source | generator | million draws a CPU second | a step of ViT-B, 86 million parameters |",
        "| --- | --- | ---: | ---: |",
        *rows,
        "",
    ]
