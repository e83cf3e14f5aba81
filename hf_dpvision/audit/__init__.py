"""Audits: what an attacker who sees what is released can show of epsilon, beside what is claimed of it.

`step.py` audits one step from within, tightly, with canary gradients. `pipeline.py` audits whole runs from within,
sampling included: whether they are what their accountant takes them for. `inspection.py` audits a whole training run
from its scores, weakly. All give lower bounds that hold with a stated confidence; none proves that a claim is true.
"""

from .directions import gradient_direction
from .inspection import Finding, audit_run
from .pipeline import PipelineAudit, audit_pipeline
from .single_run import epsilon_lower_bound, p_value
from .step import StepAudit, audit_step


__all__ = [
    "Finding", "PipelineAudit", "StepAudit", "audit_pipeline", "audit_run", "audit_step", "epsilon_lower_bound",
    "gradient_direction", "p_value",
]  # fmt: skip
