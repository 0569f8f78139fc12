"""Fuzzing through the public doors: seeded mutations of everything that a stranger may have written.

``tests/test_fuzz.py`` runs a bounded number of inputs; ``python -m benchmarks fuzz`` runs as many as are asked for.
"""
