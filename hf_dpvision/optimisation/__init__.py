"""What is done to noisy gradients and to the iterates they lead to: post-processing, which no epsilon pays for."""

from .adam_bc import AdamBC
from .averaging import ITERATE, EveryStep, Tail, WeightAverage, Weighting, refuse_other_averaging
from .low_pass import LowPass


__all__ = ["ITERATE", "AdamBC", "EveryStep", "LowPass", "Tail", "WeightAverage", "Weighting", "refuse_other_averaging"]
