"""Clipping styles: each turns squared norms into factors and states the bound that follows."""

from .automatic import Automatic
from .flat import Flat
from .protocol import Clipping


__all__ = ["Automatic", "Clipping", "Flat"]
