"""The parts of `recipes/zoo.py`: small models of timm and of transformers, the check, its limits, the report."""
