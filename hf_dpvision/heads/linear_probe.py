"""The softmax head that gradient descent trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearProbe(nn.Module):
    """Logits `W x / ||x||` of features x, for `DPTrainer` on `data.features.FeatureExamples`.

    Every example's features are brought to length 1, which looks at no other example. With cross entropy, the gradient
    of one example is `(p - y) x^T / ||x||`, of norm `||p - y|| < sqrt(2)`: the trainer finds this norm without forming
    the gradient. W starts at zero, where all classes are equally likely and the first noisy step has no random head
    to undo. Large batches, momentum and few steps are what a small epsilon wants (Panda et al. 2022,
    arXiv:2212.04486): with `logical_batch_size` equal to the size of the data set every step has everyone, and the
    accountant is exact.

    Args:
        width: d, the number of features.
        num_classes: k.

    Edge cases: features that are all zero give logits zero and train nothing.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, width))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits `[n, k]` of features `[n, d]`; the labels are the trainer's."""
        return F.linear(F.normalize(features, dim=-1), self.weight)
