"""How fast the engine is beside hand-written clients, and what it does on a bad day.

`python -m benchmarks --help`; the figures are in docs/performance.md.
"""
