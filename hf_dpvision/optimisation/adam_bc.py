"""Adam whose second moment is freed from what the privacy noise adds to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentRefused


class AdamBC(torch.optim.Optimizer):
    """DP-AdamBC with decoupled weight decay.

    With the noisy mean gradient `g_t`, whose every coordinate has noise of standard deviation `noise_std`:

        m_t = beta1 m_{t-1} + (1 - beta1) g_t            v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        s_t = max(v_t / (1 - beta2^t) - noise_std^2, gamma'),   gamma' = floor * noise_std^2
        w_t = (1 - lr * weight_decay) w_{t-1} - lr * m_t / (1 - beta1^t) / sqrt(s_t)

    In plain Adam, v is hardly more than the variance of the noise, the same for all coordinates, so that it scales
    the learning rate and adapts to nothing. Where the gradient is small against the noise, `gamma'` decides here as
    well, and the update is that of SGD with momentum at the learning rate `lr / sqrt(gamma')`.

    It costs no privacy: everything in it is computed from noisy gradients, whose epsilon covers whatever is made of
    them (post-processing), and from the standard deviation of the noise, which is public.

    Source: Tang, Shpilevskiy, Lécuyer 2024, arXiv:2312.14334, Algorithm 1; its gamma' is an absolute number, while
    `floor` is in units of the noise, so that it means the same at another clip norm or batch size.

    Args:
        params: as for any torch optimizer; DTensors too.
        lr: learning rate.
        noise_std: of one coordinate of the gradients, `noise_multiplier * sensitivity / expected batch size`. May be
            assigned anew when other noise is added.
        betas: decay of the two moments.
        floor: gamma' divided by the variance of the noise. After t steps v is known up to about `sqrt(2 / t)` of
            that variance; a floor far below lets chance decide which coordinates move fast.
        weight_decay: decoupled, as in AdamW.

    Raises:
        ArgumentRefused: `noise_std` or `floor` is not a positive finite number.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        noise_std: float,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("noise_std", noise_std), ("floor", floor)):
            if not (math.isfinite(value) and value > 0):
                raise ArgumentRefused(f"{name}={value!r}: a positive finite number is needed to correct for noise.")
        super().__init__(params, {"lr": lr, "betas": betas, "floor": floor, "weight_decay": weight_decay})
        self.noise_std = noise_std

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step along the gradients in `.grad`, after calling `closure` if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), rate = self.state[parameter], group["betas"], group["lr"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        noise = self.noise_std**2
        signal = (square / (1 - beta2 ** state["step"]) - noise).clamp_(min=group["floor"] * noise)
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.addcdiv_(mean, signal.sqrt_(), value=-rate / (1 - beta1 ** state["step"]))
