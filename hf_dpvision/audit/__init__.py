"""Audits: what an attacker who sees what is released can show of epsilon, beside what is claimed of it.

`step.py` audits one step from within, tightly, with canary gradients. `inspection.py` audits a whole training run from
its scores, weakly. Both give lower bounds that hold with a stated confidence; neither proves that a claim is true.
"""

from .inspection import Finding, audit_run
from .single_run import epsilon_lower_bound, p_value
from .step import StepAudit, audit_step, gradient_direction


__all__ = ["Finding", "StepAudit", "audit_run", "audit_step", "epsilon_lower_bound", "gradient_direction", "p_value"]
