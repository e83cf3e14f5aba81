"""Opacus as a side, by its own classes: wrapped module, optimizer and loss, as its documentation uses them.

Yousefpour et al. 2021, arXiv:2109.12298. Imported only where the package is installed (extra `dev`).
"""

from __future__ import annotations

from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.optim import SGD

from .sides import Batch, Gradients, Side, per_example_loss


TOLERANCE = 1e-3  # Opacus adds 1e-6 to each norm, which is 5e-5 of the norms of some of these models


class OpacusHooks(Side):
    """`grad_sample_mode="hooks"`: gradients of all examples are instantiated."""

    name, ours, tolerance = "Opacus hooks", False, TOLERANCE

    def prepare(self, model: nn.Module, clip_norm: float) -> None:
        """Wrap a copy; the optimizer clips and sums, its noise is never asked for."""
        super().prepare(model, clip_norm)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.wrapped = GradSampleModule(self.model, loss_reduction="sum")
        self.optimizer = DPOptimizer(
            SGD(self.trained.values(), lr=0.0), noise_multiplier=0.0, max_grad_norm=clip_norm, expected_batch_size=1,
            loss_reduction="sum",
        )  # fmt: skip

    def step(self, batch: Batch) -> Gradients:
        """Return the sum of the clipped gradients."""
        per_example_loss(self.wrapped, batch).sum().backward()
        self.optimizer.clip_and_accumulate()
        gradients = {name: p.summed_grad for name, p in self.trained.items()}
        self.optimizer.zero_grad(set_to_none=True)
        return gradients


class OpacusGhost(Side):
    """`grad_sample_mode="ghost"`: norms in a first backward pass, the sum in a second one."""

    name, ours, tolerance = "Opacus ghost", False, TOLERANCE

    def prepare(self, model: nn.Module, clip_norm: float) -> None:
        """Wrap a copy, its optimizer and its loss."""
        super().prepare(model, clip_norm)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.wrapped = GradSampleModuleFastGradientClipping(self.model, max_grad_norm=clip_norm, loss_reduction="sum")
        self.optimizer = DPOptimizerFastGradientClipping(
            SGD(self.trained.values(), lr=0.0), noise_multiplier=0.0, max_grad_norm=clip_norm, expected_batch_size=1,
            loss_reduction="sum",
        )  # fmt: skip
        self.loss = DPLossFastGradientClipping(
            self.wrapped, self.optimizer, nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum"
        )

    def step(self, batch: Batch) -> Gradients:
        """Return the sum of the clipped gradients."""
        self.loss(self.wrapped(batch["x"]), batch["y"]).backward()
        gradients = {name: p.grad for name, p in self.trained.items()}
        self.optimizer.zero_grad(set_to_none=True)
        return gradients
