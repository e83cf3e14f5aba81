"""All faults."""

from __future__ import annotations

from . import (
    faults_clipping,
    faults_draws,
    faults_layouts,
    faults_ledger,
    faults_noise,
    faults_rules,
    faults_shards,
    faults_streams,
    faults_units,
)
from .battery import CHECKS
from .fault import Fault


FAULTS: tuple[Fault, ...] = (
    *faults_noise.FAULTS,
    *faults_layouts.FAULTS,
    *faults_draws.FAULTS,
    *faults_clipping.FAULTS,
    *faults_rules.FAULTS,
    *faults_ledger.FAULTS,
    *faults_units.FAULTS,
    *faults_streams.FAULTS,
    *faults_shards.FAULTS,
)
if len({fault.id for fault in FAULTS}) != len(FAULTS) or any(fault.check not in CHECKS for fault in FAULTS):
    raise ValueError("Two faults have the same id, or one names a check that does not exist.")
