"""Device side of score_mod: examples, each a pair of functions of (score, b, h, i, j), a value and its derivative by the score.

score is a tile of float32, b and h are numbers, i and j are int32 tensors that broadcast to the tile's shape. Pass a pair to
tfkern.attention(…, score_mod=(value, derivative)).
"""

import triton
import triton.language as tl


@triton.jit
def signed_log(score, b, h, i, j):
    """sign(s) * log(1 + |s|): large scores grow slowly, and none is cut off."""
    size = tl.log(1.0 + tl.abs(score))
    return tl.where(score < 0.0, -size, size)


@triton.jit
def signed_log_derivative(score, b, h, i, j):
    return 1.0 / (1.0 + tl.abs(score))


@triton.jit
def _temperature(b, h, i, j):
    return 1.0 + 0.125 * (h + b + 1) * tl.log2(1.0 + tl.abs(i - j).to(tl.float32))


@triton.jit
def cooling(score, b, h, i, j):
    """Divide scores by a temperature that grows with the distance of the key, faster in later heads and batches. It uses all
    arguments that a score_mod has."""
    return score / _temperature(b, h, i, j)


@triton.jit
def cooling_derivative(score, b, h, i, j):
    return 1.0 / _temperature(b, h, i, j)
