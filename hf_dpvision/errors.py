"""Every error this package raises on purpose, one type per reason.

A message says three things: what was found (qualified name and value), why it breaks privacy or
arithmetic, and what to do. Refusals come before the first step, so nothing has been spent.
"""

from __future__ import annotations


class DPVisionError(Exception):
    """Base class: catch this to catch everything the package raises on purpose."""


class RefusedError(DPVisionError, ValueError):
    """A refusal before the first step: nothing private has been touched or spent."""


class ModelRefused(RefusedError):
    """The model cannot be trained with per-example clipping as it stands."""


class ArgumentRefused(RefusedError):
    """An argument, or a combination of arguments, breaks privacy or arithmetic."""


class DataRefused(RefusedError):
    """The data set cannot be trained on: empty, unlabelled, unreadable or out of range."""


class MixingRefused(ModelRefused):
    """An operation lets one example influence another one's gradient."""


class CaptureError(DPVisionError, RuntimeError):
    """The interception could not account for every trainable parameter; no gradient is returned."""


class AccountingError(DPVisionError, RuntimeError):
    """The accountants contradict one another, or none of them can certify a bound."""


class BudgetExceeded(DPVisionError, RuntimeError):
    """The next step would spend more than the privacy budget that was set."""


class ProcessLost(DPVisionError, RuntimeError):
    """Another process of the same run has ended; what was charged stays charged."""


class LedgerRefused(RefusedError):
    """The ledger on disk is missing, edited, in use, or that of another run: what was spent cannot be known."""


class LedgerError(DPVisionError, RuntimeError):
    """A step could not be written down, so it was not taken."""


class DeviceMemoryError(DPVisionError, RuntimeError):
    """The device cannot hold a single example; the step was given up before its noise."""


class LoadingError(DPVisionError, RuntimeError):
    """A process that loads examples has ended or hangs; nothing of the unfinished step has been released."""


class CheckpointError(DPVisionError, RuntimeError):
    """A checkpoint could not be written; those before it and the ledger are as they were."""
