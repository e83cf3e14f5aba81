"""Check a released model's privacy statement without trusting whoever wrote it: `verify_folder`, `verify_hub`."""

from .findings import Finding
from .folder import Verification, verify_folder
from .hub import fetched


__all__ = ["Finding", "Verification", "fetched", "verify_folder"]
