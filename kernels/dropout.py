"""Device side of dropout: which probabilities are kept. An element's random bits depend on its place alone, not on tiles.

Element (i, j) of head h of sequence b takes its bits from Philox-4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The key is the seed; the counter is (j // 8, i, b * heads + h,
offset). The 128 bits of a counter serve eight neighbouring keys, 16 bits each, so that of dropping is a multiple of 1 / 65536.
"""

import triton
import triton.language as tl

from . import tile

ROUNDS = tl.constexpr(7)


@triton.jit
def _words(seed, bh, rows, groups):
    """Four random words for each row and group of eight keys. The two index tensors broadcast to the shape of the result."""
    key = tl.load(seed)
    offset = tl.load(seed + 1).to(tl.int32)
    rows, groups = tl.broadcast(rows, groups)
    return tl.philox(key, groups, rows, rows * 0 + bh, rows * 0 + offset, ROUNDS)


@triton.jit
def _numbers(w0, w1, w2, w3):
    """Words of shape [A, B] as 16-bit numbers [A, B, 2, 2, 2]: the lowest word comes first, and in it the lower half."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)
    return tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)


@triton.jit
def keep_at(drop, bh, rows, groups):
    """[A, 8 B]: True where the probability is kept, for the queries rows [A, 1] and the eight keys of each of groups [1, B]."""
    w0, w1, w2, w3 = _words(drop.seed, bh, rows, groups)
    numbers = _numbers(w0, w1, w2, w3) >= tile.whole(drop.threshold)
    return tl.reshape(numbers, [rows.shape[0], 8 * groups.shape[1]])


@triton.jit
def keep_transposed_at(drop, bh, rows, groups):
    """The transpose of keep_at, [8 B, A], for rows [1, A] and groups [B, 1]."""
    w0, w1, w2, w3 = _words(drop.seed, bh, rows, groups)
    numbers = _numbers(w0, w1, w2, w3) >= tile.whole(drop.threshold)
    return tl.reshape(tl.permute(numbers, [0, 2, 3, 4, 1]), [8 * groups.shape[0], rows.shape[1]])


@triton.jit
def keep(drop, bh, start_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """keep_at for the queries from start_m and the keys from start_n on, [BLOCK_M, BLOCK_N]. start_n % 8 == 0."""
    return keep_at(drop, bh, (start_m + tl.arange(0, BLOCK_M))[:, None], (start_n // 8 + tl.arange(0, BLOCK_N // 8))[None, :])


@triton.jit
def keep_transposed(drop, bh, start_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The transpose of `keep`, [BLOCK_N, BLOCK_M]."""
    return keep_transposed_at(
        drop, bh, (start_m + tl.arange(0, BLOCK_M))[None, :], (start_n // 8 + tl.arange(0, BLOCK_N // 8))[:, None]
    )
