"""Measuring: every kernel room's benchmarks against its reference, the card's ceilings and a baseline, in one process.

`jobs` finds what there is to measure, `parity` is the gate before any time, `timing` the clock, `kernels` the run,
`table` what people read. Knows no kernel.
"""
