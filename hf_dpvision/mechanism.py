"""What one logical step does to a batch: with privacy, and without it for the baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .accounting import Ledger
from .accounting.journal import Journal
from .clipping import Clipping, Style
from .dpsgd import PerExampleLoss, add_clipped_gradient_to_shards, clipped_gradient
from .errors import BudgetExceeded
from .noise import NoiseSource, add_noise
from .rules.cost import NormRule
from .rules.planner import Planner
from .sampling import KEY_BYTES, new_key
from .secure_noise import SecureNoiseSource
from .trained import trained_parameters


class Randomness(Protocol):
    """Where the sampling key and the noise come from."""

    secret: bool

    def sampling_key(self, train_call: int) -> bytes:
        """Return the key of the draws of the `train_call`-th call of `train()`."""

    def noise_source(self, device: torch.device) -> Callable[[int], NoiseSource]:
        """Return whom to ask for the noise of the `step`-th charged step of the ledger, 1 being the first."""


@dataclass
class SystemRandomness:
    """The operating system's entropy: nothing can be repeated, nothing is saved.

    Args:
        secure_noise: whether noise comes from a cryptographic generator; see `secure_noise.py`.
    """

    secure_noise: bool = False
    secret = True

    def sampling_key(self, train_call: int) -> bytes:
        return new_key()

    def noise_source(self, device: torch.device) -> Callable[[int], NoiseSource]:
        # one for all steps: it only ever moves on
        source = SecureNoiseSource(device) if self.secure_noise else NoiseSource.from_os_entropy(device)
        return lambda step: source


@dataclass(frozen=True)
class FixedRandomness:
    """Repeatable draws and noise for tests. It protects nothing, and the statement of the run says so.

    The noise of a step depends on its number in the ledger alone, so that a resumed run can be compared with one that
    was not interrupted, and a step that is taken again gets other noise.
    """

    seed: int
    secret = False

    def sampling_key(self, train_call: int) -> bytes:
        return self._hash(f"{self.seed} {train_call}", KEY_BYTES)

    def noise_source(self, device: torch.device) -> Callable[[int], NoiseSource]:
        def source(step: int) -> NoiseSource:
            seed = int.from_bytes(self._hash(f"noise {self.seed} {step}", 7))
            return NoiseSource.for_tests(seed, device)

        return source

    @staticmethod
    def _hash(text: str, size: int) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=size).digest()


class Mechanism(Protocol):
    """The three things a logical step asks for."""

    def sum_gradients(self, model: nn.Module, per_example_loss: PerExampleLoss, batch: Any) -> dict[str, Tensor]:
        """Return parameter name -> sum over the examples of one microbatch."""

    def add_to_shards(
        self, model: nn.Module, per_example_loss: PerExampleLoss, batch: Any, *, counts: bool
    ) -> None:
        """Add that sum to the `.grad` of a sharded model, over all processes; nothing of a batch that does not count.

        Every process has to call it as often as every other one.
        """

    def charge(self) -> None:
        """Account for one step; called before anything of it is released, also when the batch is empty."""

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what may be released of the sums over one logical batch; called once per step, in one process."""


class _Excluded(Style):
    """Clipping for examples that must contribute nothing."""

    def factors(self, squared_norms: Tensor) -> Tensor:
        return torch.zeros_like(squared_norms)

    def sensitivity(self) -> float:
        return 0.0


class PrivateMechanism:
    """DP-SGD on Poisson-sampled batches (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1).

    Guarantee: the sums returned by `add_noise` have had Gaussian noise of standard deviation
    `noise_multiplier * clipping.sensitivity()` added, and `ledger` has an event for each of them.

    Args:
        clipping, norm_rule, backward_passes, rows, memory_bound: as for `clipped_gradient`.
        repeatable: kernels are chosen by the planner's model, the same in every run. Otherwise they are timed on an
            accelerator, once per shape; on a CPU the model is as good.
        noise_multiplier: sigma, without unit.
        sample_rate: probability with which each example takes part in a step.
        planned_steps: most events that `ledger` may hold.
        ledger: events so far; continued, never reset.
        journal: the ledger on disk, in the process that writes it; None in the others.
        noise: source by number of the charged step; drawn from once per parameter and step.
    """

    def __init__(
        self,
        *,
        clipping: Clipping,
        norm_rule: NormRule,
        backward_passes: int,
        rows: int,
        memory_bound: float = 1.05,
        repeatable: bool = False,
        noise_multiplier: float,
        sample_rate: float,
        planned_steps: int,
        ledger: Ledger,
        journal: Journal | None,
        noise: Callable[[int], NoiseSource],
    ) -> None:
        self.clipping = clipping
        self.noise_multiplier = noise_multiplier
        self.sample_rate = sample_rate
        self.planned_steps = planned_steps
        self.ledger = ledger
        self._journal = journal
        self._norm_rule = norm_rule
        self._backward_passes, self._rows = backward_passes, rows
        self._planner = Planner(memory_bound, measure=not repeatable and torch.accelerator.is_available())
        self._noise = noise

    def sum_gradients(self, model: nn.Module, per_example_loss: PerExampleLoss, batch: Any) -> dict[str, Tensor]:
        """Return the sum of clipped gradients; see `clipped_gradient`."""
        return clipped_gradient(
            model,
            per_example_loss,
            batch,
            clipping=self.clipping,
            norm_rule=self._norm_rule,
            backward_passes=self._backward_passes,
            rows=self._rows,
            planner=self._planner,
        ).gradients

    def add_to_shards(
        self, model: nn.Module, per_example_loss: PerExampleLoss, batch: Any, *, counts: bool
    ) -> None:
        """Add clipped gradients to the shards; see `add_clipped_gradient_to_shards`."""
        clipping = self.clipping if counts else _Excluded()
        add_clipped_gradient_to_shards(
            model, per_example_loss, batch, clipping=clipping, norm_rule=self._norm_rule, rows=self._rows
        )

    def charge(self) -> None:
        """Put one step into the ledger, on disk first.

        Raises:
            BudgetExceeded: all planned steps have been charged.
            LedgerError: the step could not be written down; it must not be taken.
        """
        if self.ledger.steps >= self.planned_steps:
            raise BudgetExceeded(
                f"Step {self.ledger.steps + 1} would exceed the {self.planned_steps} planned steps, for which the "
                "claimed epsilon holds. Plan more steps from the start."
            )
        if self._journal is not None:
            self._journal.charge(self.sample_rate, self.noise_multiplier)
        self.ledger.charge(self.sample_rate, self.noise_multiplier)

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums plus the noise of the step charged last; see `noise.add_noise`."""
        source = self._noise(self.ledger.steps)
        return add_noise(sums, self.noise_multiplier * self.clipping.sensitivity(), source)


class WithoutPrivacy:
    """Plain gradients through the same data path: no clipping, no noise, epsilon infinite."""

    def sum_gradients(self, model: nn.Module, per_example_loss: PerExampleLoss, batch: Any) -> dict[str, Tensor]:
        """Return the gradients of the summed loss by ordinary autograd, zeros for what was not used."""
        trained = trained_parameters(model)
        total = per_example_loss(model, batch).sum()
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(trained, gradients, strict=True))

    def add_to_shards(
        self, model: nn.Module, per_example_loss: PerExampleLoss, batch: Any, *, counts: bool
    ) -> None:
        """Add the gradients of the summed loss, by FSDP2 alone."""
        total = per_example_loss(model, batch).sum()
        (total if counts else total * 0).backward()

    def charge(self) -> None:
        """Nothing is accounted for."""

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums as they are."""
        return sums
