"""How faults reach per-example gradients and mechanisms: by rules, and by wrapping, never by touching a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_dpvision.capture import Call
from hf_dpvision.mechanism import Mechanism
from hf_dpvision.rules import RULES
from hf_dpvision.rules.gradients import PerExampleGradient, squared_rows
from hf_dpvision.uses import Slot


Alter = Callable[[Slot, PerExampleGradient], PerExampleGradient]


class Delegated(PerExampleGradient):
    """A form that answers as another one does; a fault overrides one answer."""

    def __init__(self, honest: PerExampleGradient) -> None:
        self.honest = honest

    def instantiate(self) -> Tensor:
        return self.honest.instantiate()

    def weighted_sum(self, factors: Tensor | None) -> Tensor:
        return self.honest.weighted_sum(factors)

    def kept(self, examples: Tensor) -> PerExampleGradient:
        return type(self)(self.honest.kept(examples))

    def squared_norms(self) -> Tensor:
        return self.honest.squared_norms()

    def ghost_squared_norms(self) -> Tensor:
        return self.honest.ghost_squared_norms()


class MeasuredAs(Delegated):
    """Summed as it is, with the norms of something else."""

    def __init__(self, honest: PerExampleGradient, squared: Tensor) -> None:
        super().__init__(honest)
        self.squared = squared

    def kept(self, examples: Tensor) -> PerExampleGradient:
        return MeasuredAs(self.honest.kept(examples), self.squared)

    def squared_norms(self) -> Tensor:
        return self.squared

    def ghost_squared_norms(self) -> Tensor:
        return self.squared


def unmeasured(gradient: PerExampleGradient) -> MeasuredAs:
    """The same gradient left out of the norm."""
    return MeasuredAs(gradient, torch.zeros_like(squared_rows(gradient.instantiate())))


@dataclass(frozen=True)
class _AlteredCall(Call):
    alter: Alter

    def slot(self, theta: Any, shape: Any = None, generic: bool = False, reads: Tensor | None = None) -> Any:
        slot = super().slot(theta, shape, generic, reads)
        return None if slot is None else _AlteredSlot(slot, self.alter)


class _AlteredSlot:
    """Where a rule delivers to."""

    def __init__(self, slot: Slot, alter: Alter) -> None:
        self._slot, self._alter = slot, alter
        self.theta = slot.theta

    def receive(self, gradient: PerExampleGradient) -> None:
        self._slot.receive(self._alter(self._slot, gradient))


def altered(functions: Mapping[Callable, Alter] | dict) -> dict[Callable, Callable]:
    """Rules for these torch functions that deliver what `alter` makes of the honest gradient."""

    def rule_of(honest: Callable, alter: Alter) -> Callable:
        def rule(call: Call, *args: Any, **kwargs: Any) -> Any:
            return honest(_AlteredCall(call.function, call.args, call.kwargs, call.mode, alter), *args, **kwargs)

        return rule

    return {function: rule_of(RULES[function], alter) for function, alter in functions.items()}


class Wrapped:
    """A mechanism that does what another one does; a fault overrides one method."""

    def __init__(self, honest: Mechanism) -> None:
        self.honest = honest

    def sum_gradients(self, model: Any, per_example_loss: Any, batch: Any) -> dict[str, Tensor]:
        """As the other."""
        return self.honest.sum_gradients(model, per_example_loss, batch)

    def add_to_shards(self, model: Any, per_example_loss: Any, batch: Any, *, counts: bool) -> None:
        """As the other."""
        self.honest.add_to_shards(model, per_example_loss, batch, counts=counts)

    def charge(self) -> None:
        """As the other."""
        self.honest.charge()

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the other."""
        return self.honest.add_noise(sums)

    def std(self) -> float:
        """The honest deviation, sigma C."""
        return self.honest.noise_multiplier * self.honest.clipping.sensitivity()

    def source(self) -> Any:
        """The honest source of this step."""
        return self.honest._noise(self.honest.ledger.steps)
