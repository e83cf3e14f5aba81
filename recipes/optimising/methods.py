"""What is compared: ways to go down, their learning rates, and averages of their iterates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hf_dpvision import accounting
from hf_dpvision.optimisation import EveryStep, Tail, Weighting


EPSILON, DELTA, BATCH, STEPS, TRAIN_IMAGES = 2.0, 1e-5, 512, 50, 1437
# by which the weights move per gradient; the default recipe's 0.6 with momentum 0.9
FINE_TUNING = "fine-tuning"
GAIN = {FINE_TUNING: 0.6 / 0.1, "features": 2.0 / 0.1}
FLOORS = (1.0, 0.1)
LAST = "last iterate"
AVERAGES: dict[str, Weighting] = {
    "moving average, decay 0.8": EveryStep(0.8),
    "moving average, decay 0.9": EveryStep(0.9),
    "mean of the last 20 %": Tail(41),
    "mean of the last 50 %": Tail(26),
}


@dataclass(frozen=True)
class Method:
    """One way to go down.

    Args:
        name: in the report.
        rate: learning rate at unit gain, given the standard deviation of the noise in one coordinate.
        options: of `DPTrainingArguments`.
        averages: whether the averages of its iterates are measured as well.
    """

    name: str
    rate: Callable[[float], float]
    options: dict[str, object]
    averages: bool = False


MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9"}
PLAIN = {"optim": "sgd", "optim_args": "momentum=0.0"}
METHODS = (
    Method("SGD, momentum 0.9, falling rate", lambda std: 0.1, MOMENTUM, averages=True),
    Method("SGD, momentum 0.9, constant rate", lambda std: 0.1, MOMENTUM | {"lr_scheduler_type": "constant"}, True),
    Method("SGD without momentum", lambda std: 1.0, PLAIN),
    *(
        Method(
            f"low-pass filter, order {order}, cutoff {cutoff:g}",
            lambda std: 1.0,
            PLAIN | {"low_pass_filter": order, "low_pass_cutoff": cutoff},
        )
        for order, cutoff in ((1, 0.03), (2, 0.03), (1, 0.1))
    ),
    Method("Adam", lambda std: std, {"optim": "adamw_torch"}),
    *(
        Method(
            f"DP-AdamBC, floor {floor:g}",
            lambda std, floor=floor: std * math.sqrt(floor),
            {"optim": "adamw_torch", "noise_bias_correction": True, "noise_bias_floor": floor},
        )
        for floor in FLOORS
    ),
)
FINE_TUNED = {METHODS[0].name: 5, METHODS[3].name: 3, METHODS[6].name: 3, METHODS[7].name: 3}  # method -> runs
FEATURE_RUNS, MULTIPLES = 5, (1.0, 2.0)


def noise_std() -> float:
    """Standard deviation of the noise in one coordinate of the mean gradient, at clip norm 1."""
    sigma = accounting.noise_multiplier(
        target_epsilon=EPSILON, delta=DELTA, sample_rate=BATCH / TRAIN_IMAGES, steps=STEPS
    )
    return sigma / BATCH
