"""One of two processes that spread every model of cases.py over both, for models/test_sharded.py: `... FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES, classification_loss, images, perturbed
from reference import select
from torch import Tensor

from hf_dpvision import clipped_gradient, clipping
from hf_dpvision.dpsgd import add_clipped_gradient_to_shards
from hf_dpvision.errors import DPVisionError
from hf_dpvision.sharding import Sharding


FLAT = clipping.Flat(5.0)
PER_LAYER = clipping.PerGroup(FLAT, shares=clipping.Shares.SIZE)
BY_LAYER = ("beit", "resnetv2_bit", "transformers_vit")  # these also by layer
SHARES = {0: [0, 2], 1: [1]}  # of the three examples


class Nothing(clipping.Style):
    """Clipping for a process that has run out of examples."""

    def factors(self, squared_norms: Tensor) -> Tensor:
        return torch.zeros_like(squared_norms)

    def sensitivity(self) -> float:
        return 0.0


def errors_of(case: Any, rank: int, style: clipping.Clipping) -> dict[str, Any]:
    """Largest deviations of norms and sums from those of the whole model, relative to the norm of either."""
    torch.manual_seed(0)
    model = perturbed(case.build(), torch.float64)
    batch = images(case.image_size, torch.float64)
    expected = clipped_gradient(model, classification_loss, batch, clipping=style)
    options = Sharding()
    blocks = len(options.blocks(model))
    options.apply(model, "cpu")
    own = select(batch, SHARES[rank])
    norms = add_clipped_gradient_to_shards(model, classification_loss, own, clipping=style)
    # a second microbatch, of which only the second process has anything that counts: nothing of it for brevity
    add_clipped_gradient_to_shards(model, classification_loss, select(batch, [0]), clipping=Nothing())
    total = torch.cat([grad.flatten() for grad in expected.gradients.values()]).norm()
    worst = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            difference = (parameter.grad.full_tensor() - expected.gradients[name]).norm() / total
            worst = max(worst, float(difference))
        elif expected.gradients[name].any():
            worst = float("inf")
    norm_error = float(((norms - expected.norms[SHARES[rank]]) / expected.norms[SHARES[rank]]).abs().max())
    return {"norms": norm_error, "sums": worst, "blocks": blocks}


def main(folder: Path) -> None:
    """Write case name -> errors of this process."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    found = {}
    flat = [(case.name, case, FLAT) for case in CASES]
    for name, case, style in [*flat, *((f"{c.name} by layer", c, PER_LAYER) for c in CASES if c.name in BY_LAYER)]:
        try:
            found[name] = errors_of(case, rank, style)
        except DPVisionError as error:
            found[name] = {"refused": str(error)}
    (folder / f"errors{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
