"""The benchmarks: one case per op in cases/, the measuring in harness/, the command line in run.py."""
