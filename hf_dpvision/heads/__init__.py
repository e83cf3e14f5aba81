"""Linear heads on the features of a frozen model: by gradient descent, by least squares, by class prototypes.

All three have no bias and work on features of unit length, so that their weights serve as the last layer of the model
itself (`backbone.set_head`). The first is trained by `DPTrainer`; the other two need one release each.
"""

from .least_squares import Moments, least_squares_head, moments, released_moments, ridge_above_noise
from .linear_probe import LinearProbe
from .prototypes import class_sums, prototype_head, released_class_sums


__all__ = [
    "LinearProbe",
    "Moments",
    "class_sums",
    "least_squares_head",
    "moments",
    "prototype_head",
    "released_class_sums",
    "released_moments",
    "ridge_above_noise",
]
