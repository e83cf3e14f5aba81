"""A low-pass filter in front of the optimizer: what is left of the gradients is what stays over several steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from scipy.signal import butter
from torch import Tensor


_MEMORY, _GAIN = "low_pass_{}", "low_pass_gain_{}"  # keys in the optimizer's state of a parameter


@dataclass(frozen=True)
class LowPass:
    """DOPPLER: a linear filter over steps, one coordinate like another, corrected for its start.

    With noisy gradients `g_t`, and nothing before t = 1:

        m_t = sum_{k=0..n} b_k g_{t-k} - sum_{k=1..n} a_k m_{t-k}
        c_t = sum_{k=0..min(n, t-1)} b_k - sum_{k=1..n} a_k c_{t-k},    the optimizer gets m_t / c_t

    A gradient that stays the same goes through unchanged from the first step on, since c_t is the filter's answer to a
    constant; noise, which is new at each step, is weakened.

    It costs no privacy: the filter sees noisy gradients only, whose epsilon covers whatever is computed from them
    (post-processing).

    Source: Zhang, Bu, Hong, Razaviyayn 2024, arXiv:2408.13460, Algorithm 1. The recursion is computed in the
    transposed direct form, which keeps as many tensors per parameter as the order of the filter.

    Attributes:
        b: of the gradients, `n + 1` numbers.
        a: of the earlier results, `n` numbers, `a_1` first.
    """

    b: tuple[float, ...]
    a: tuple[float, ...]

    @classmethod
    def butterworth(cls, order: int, cutoff: float) -> LowPass:
        """Return the filter of this order that is flat below `cutoff` and halves the power there.

        Args:
            order: 1 or 2.
            cutoff: in cycles per step, between 0 and 0.5. Order 1 at 0.032 is `b = (1/11, 1/11), a = (-9/11)`.
        """
        b, a = butter(order, 2 * cutoff)
        return cls(tuple(map(float, b)), tuple(map(float, a[1:])))

    def answer(self, value: Any, memory: list[Any]) -> tuple[Any, list[Any]]:
        """Return the filter's answer to one value, a number or a tensor, and the memory it has from then on.

        Args:
            value: of this step.
            memory: as returned at the step before; `[0.0] * len(self.a)` at first.
        """
        result = memory[0] + self.b[0] * value
        later = [*memory[1:], 0.0]
        return result, [s + b * value - a * result for s, b, a in zip(later, self.b[1:], self.a, strict=True)]

    @contextmanager
    def before(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside, every step of `optimizer` gets filtered gradients.

        The filter's memory lies in `optimizer.state`, but not while a step is taken, since some optimizers take a
        state that is not empty for their own. So it is saved, loaded and sharded as the optimizer's own is.
        """
        kept: dict[Tensor, dict[str, Any]] = {}

        @torch.no_grad()
        def filter_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                if parameter.grad is not None:
                    parameter.grad, kept[parameter] = self._filtered(parameter.grad, optimizer.state[parameter])

        def keep_memory(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for parameter, memory in kept.items():
                optimizer.state[parameter] |= memory
            kept.clear()

        hooks = [
            optimizer.register_step_pre_hook(filter_gradients),
            optimizer.register_step_post_hook(keep_memory),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _filtered(self, gradient: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return m_t / c_t and what to remember; what was remembered is taken out of `state`."""
        orders = range(len(self.a))
        mean, memory = self.answer(gradient, [state.pop(_MEMORY.format(i), 0.0) for i in orders])
        gain, gains = self.answer(1.0, [state.pop(_GAIN.format(i), 0.0) for i in orders])
        remembered = {_MEMORY.format(i): memory[i] for i in orders} | {_GAIN.format(i): gains[i] for i in orders}
        return mean / gain, remembered
