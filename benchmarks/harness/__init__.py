"""The measurement code: cases, the correctness gate, timing, memory, ceilings, results, tables and plots."""
