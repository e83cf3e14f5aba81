"""Deliberate faults of the mechanism and the checks that catch them; `recipes/fault_injection.py` runs both."""
