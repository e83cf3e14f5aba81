"""The parts of `recipes/benchmark.py`: cases, sides, measurement, report, plot."""
