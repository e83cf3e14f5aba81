"""What `recipes/results.py` is made of: records of runs, what is aimed at, the page and the picture."""
