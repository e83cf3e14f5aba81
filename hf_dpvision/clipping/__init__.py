"""Clipping styles: each turns squared norms into factors and states the bound that follows."""

from .automatic import Automatic
from .flat import Flat
from .per_group import ByPrefix, PerGroup, Shares, by_block, by_layer
from .protocol import Clipping, Groups, Style, finite_examples


__all__ = [
    "Automatic", "ByPrefix", "Clipping", "Flat", "Groups", "PerGroup", "Shares", "Style", "by_block", "by_layer",
    "finite_examples",
]  # fmt: skip
