"""The parts of `recipes/optimisation.py`: what is compared, and the report."""
