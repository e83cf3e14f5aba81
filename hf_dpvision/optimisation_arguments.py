"""The arguments that say what is made of noisy gradients and of the iterates; part of `DPTrainingArguments`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers.training_args import OptimizerNames

from .errors import ArgumentRefused
from .numeric import is_number
from .optimisation import EveryStep, LowPass, Tail, Weighting


_ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
_AVERAGING = (OptimizerNames.SCHEDULE_FREE_ADAMW, OptimizerNames.SCHEDULE_FREE_RADAM, OptimizerNames.SCHEDULE_FREE_SGD)
_FREE = "It is post-processing, and leaves epsilon as it is."


@dataclass
class OptimisationArguments:
    """All of it is post-processing of what epsilon covers already, and changes neither clipping nor noise."""

    noise_bias_correction: bool = field(
        default=False,
        metadata={
            "help": "With optim adamw_torch, subtract the variance of the privacy noise from Adam's second moment "
            f"(DP-AdamBC, Tang et al. 2024, arXiv:2312.14334). {_FREE} adam_epsilon has no effect then."
        },
    )
    noise_bias_floor: float = field(
        default=1.0,
        metadata={
            "help": "With noise_bias_correction, the least that the corrected second moment counts as, divided by the "
            "variance of the noise. Lower makes larger steps: the learning rate has to fall by its root."
        },
    )
    low_pass_filter: int = field(
        default=0,
        metadata={
            "help": "Order, 1 or 2, of a low-pass filter that noisy gradients go through before the optimizer gets "
            f"them (DOPPLER, Zhang et al. 2024, arXiv:2408.13460); 0 for none. {_FREE} Takes so many more tensors per "
            "parameter.",
            "choices": [0, 1, 2],
        },
    )
    low_pass_cutoff: float = field(
        default=0.1,
        metadata={
            "help": "Where low_pass_filter halves the power, in cycles per step, between 0 and 0.5. Lower takes more "
            "noise away, and lets the gradient arrive later."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate, save and release an exponential moving average of the weights with this decay, "
            f"min(decay, (1 + t) / (10 + t)) at step t, instead of the last ones. {_FREE}"
        },
    )
    tail_averaging: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate, save and release the mean of the weights behind so many last steps, or behind this "
            f"fraction of all steps if below 1, and report how far they lie apart. {_FREE}"
        },
    )

    def check_optimisation(self, optim: OptimizerNames | str, disable_dp: bool) -> None:
        """Raise for what cannot be meant with this optimizer, and with privacy or without.

        Raises:
            ArgumentRefused: naming the argument, its value, the reason and the way out.
        """
        self._check_ranges()
        if self.noise_bias_correction:
            self._check_correction(optim, disable_dp)
        if self.ema_decay is not None and self.tail_averaging is not None:
            raise ArgumentRefused(
                f"ema_decay={self.ema_decay!r} and tail_averaging={self.tail_averaging!r}: one average is released. "
                "Give one of them."
            )
        if self.build_weighting(1) is not None and optim in _AVERAGING:
            raise ArgumentRefused(
                f"optim={OptimizerNames(optim).value!r} averages the iterates itself and exchanges them in the "
                f"model, and so would ema_decay={self.ema_decay!r}, tail_averaging={self.tail_averaging!r}. Leave one "
                "of them out."
            )

    def _check_ranges(self) -> None:
        allowed = {
            "noise_bias_floor": (lambda value: 0 < value < math.inf, "a positive finite number", "1 or 0.1"),
            "low_pass_filter": (lambda value: value in (0, 1, 2), "an order, 1 or 2, or 0 for no filter", "1"),
            "low_pass_cutoff": (lambda value: 0 < value < 0.5, "a frequency between 0 and 0.5 cycles per step", "0.1"),
            "ema_decay": (lambda value: 0 < value < 1, "a decay between 0 and 1", "0.9 to 0.999"),
            "tail_averaging": (
                lambda value: 0 < value < 1 or (value >= 2 and value % 1 == 0),
                "a fraction of all steps below 1, or a whole number of at least 2 steps",
                "0.2",
            ),
        }
        for name, (fits, what, example) in allowed.items():
            value = getattr(self, name)
            if value is not None and not (is_number(value) and fits(value)):
                raise ArgumentRefused(f"{name}={value!r} is not {what}. Try {example}.")

    def _check_correction(self, optim: OptimizerNames | str, disable_dp: bool) -> None:
        if disable_dp:
            raise ArgumentRefused(
                "noise_bias_correction=True with disable_dp=True: there is no noise whose variance could be "
                "subtracted. Leave it off for the run without privacy."
            )
        if optim not in _ADAMW:
            raise ArgumentRefused(
                f"noise_bias_correction=True with optim={OptimizerNames(optim).value!r}: what is corrected is "
                "the second moment of torch's AdamW. Set optim='adamw_torch', or leave it off."
            )
        if self.low_pass_filter:
            raise ArgumentRefused(
                f"noise_bias_correction=True with low_pass_filter={self.low_pass_filter!r}: behind the filter the "
                "noise has another variance than the one that is subtracted. Leave one of the two out."
            )

    def build_low_pass(self) -> LowPass | None:
        """Return the filter; None if the optimizer gets the noisy gradients as they are."""
        return LowPass.butterworth(self.low_pass_filter, self.low_pass_cutoff) if self.low_pass_filter else None

    def build_weighting(self, last_step: int) -> Weighting | None:
        """Return how iterates are averaged in a training that ends behind `last_step`; None if they are not."""
        if self.ema_decay is not None:
            return EveryStep(self.ema_decay)
        if self.tail_averaging is None:
            return None
        steps = self.tail_averaging if self.tail_averaging >= 1 else round(self.tail_averaging * last_step)
        return Tail(max(1, last_step - max(1, int(steps)) + 1))

    def optimisation_in_words(self) -> dict[str, str]:
        """Return what of this is switched on, to be shown on a card."""
        said = {}
        if self.noise_bias_correction:
            said["second moment"] = f"without the variance of the noise (DP-AdamBC, floor {self.noise_bias_floor:g})"
        if self.low_pass_filter:
            said["low-pass filter"] = f"order {self.low_pass_filter}, cutoff {self.low_pass_cutoff:g} cycles per step"
        if self.ema_decay is not None:
            said["released weights"] = f"exponential moving average, decay {self.ema_decay:g}"
        if self.tail_averaging is not None:
            steps = self.tail_averaging
            last = f"{steps:.3g} of the steps" if steps < 1 else f"{int(steps)} steps"
            said["released weights"] = f"mean over the last {last}"
        return said

