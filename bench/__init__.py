"""Benchmarks: what is timed (shapes), against whom (providers), how (runner), and how it is drawn (plots).

Installed as tfkern.bench; `tfkern bench` runs it. A checkout has more: static/ looks at machine code without a GPU, gpu/ is
what `make gpu` runs, reference/ compares our models with other people's, suite/ has the same cases for pytest-benchmark.
"""
