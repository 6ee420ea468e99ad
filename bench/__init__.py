"""Benchmarks: what is timed (shapes), against whom (providers), how (runner), and how it is drawn (plots).

Installed as tfkern.bench; `tfkern bench` runs it. aot.py and compile_gate.py compile kernels without a GPU and without torch.
"""
