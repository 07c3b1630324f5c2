"""The measuring: what a case is, the correctness gate, timing, memory, ceilings, results, tables and plots."""
