"""Tests, benchmarks and a teacher on whatever GPU is at hand, within minutes.

`python -m benchmarks.device` runs four parts, each in a process of its own, so that a crash or a
hang of one leaves the others: `checks` (CUDA agrees with the CPU), `run` (the default run), `speed`
(benchmarks) and `teacher` (a larger Fashion-MNIST teacher, trained for as long as time is left).
A part is a series of rows. Each row is written to `<out>/<card>.json` as soon as it is measured,
and a row that fails is a row with its reason.
"""
