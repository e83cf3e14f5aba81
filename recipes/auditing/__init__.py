"""The parts of `recipes/audit.py`, one for each section of its report."""
