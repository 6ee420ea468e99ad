"""Loads by TMA for Hopper, and rows in shared memory zeroed."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .parts import tma_load


@gluon.jit
def load(descs, at, full, buffers):
    """Load a tile of the same rows of each tensor of descs. Together they are one arrival at `full`."""
    mbarrier.expect(full, len(descs) * descs[0].block_type.nbytes)
    for i in gl.static_range(len(descs)):
        tma_load(descs[i], at, full, buffers[i])


@gluon.jit
def load_seen(descs, at, full, buffers, start, lo, hi, n, cut, cuts):
    """As load, but rows that nothing sees are zeroed: they may be NaN, and 0 * NaN would reach what is summed over them.

    Of the sequence rows [lo, hi) are seen, and the tile begins with its row `start`. TMA zeroes the rows beyond a tensor, which
    has n. If others have to be zeroed, the tile arrives at `cut` first. Returns cuts, how often `cut` was used so far.
    """
    ROWS: gl.constexpr = buffers[0].shape[2]
    if (start < lo) | (gl.minimum(at[2] + ROWS, n) > at[2] - start + hi):
        load(descs, at, cut, buffers)
        mbarrier.wait(cut, cuts & 1)
        for i in gl.static_range(len(descs)):
            zero_rows(buffers[i], lo - start, hi - start)
        fence_async_shared()
        mbarrier.arrive(full, count=1)
        cuts += 1
    else:
        load(descs, at, full, buffers)
    return cuts


@gluon.jit
def zero_rows(buffer, lo, hi):
    """Zero the rows outside [lo, hi) of a tile in shared memory, 8 at a time, as a producer has few registers."""
    ROWS: gl.constexpr = buffer.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    x = buffer.reshape([ROWS, buffer.shape[3]])
    for first in gl.static_range(0, ROWS, 8):
        part = x.slice(first, 8)
        row = first + gl.arange(0, 8, layout=gl.SliceLayout(1, LAYOUT))
        part.store(gl.where(((row >= lo) & (row < hi))[:, None], part.load(LAYOUT), 0.0))
