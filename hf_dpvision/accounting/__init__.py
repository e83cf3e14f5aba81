"""Privacy accounting: what a run of DP-SGD costs, how much noise a budget needs, and the claim in words."""

from .bounds import Bounds
from .calibration import noise_multiplier
from .claim import claim
from .events import Event
from .gdp import GaussianBound
from .ledger import Ledger
from .routing import epsilon
from .search import Search
from .selection import Poisson, Stopping, TruncatedNegativeBinomial


__all__ = [
    "Bounds",
    "Event",
    "GaussianBound",
    "Ledger",
    "Poisson",
    "Search",
    "Stopping",
    "TruncatedNegativeBinomial",
    "claim",
    "epsilon",
    "noise_multiplier",
]
