"""Benchmarks: one case per op in cases/, the measurement code in harness/, the command line in run.py."""
