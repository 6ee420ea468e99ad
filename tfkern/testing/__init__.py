"""Named problems, their inputs, and the error budget: shared by the tests, the benchmarks, `tfkern verify` and the demo."""

from tfkern.testing.budget import Error, check, compare, judge, plain, results, truth
from tfkern.testing.cases import CASES, CAUSAL, FEATURE_CASES, SHORT, Case, needs_triton
from tfkern.testing.inputs import GRADIENTS, Inputs, make_inputs

__all__ = [
    "CASES", "CAUSAL", "FEATURE_CASES", "GRADIENTS", "SHORT", "Case", "Error", "Inputs", "check", "compare", "judge",
    "make_inputs", "needs_triton", "plain", "results", "truth",
]  # fmt: skip
