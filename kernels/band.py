"""All causal and window geometry: query i sees key j where i + shift - left <= j <= i + shift + right.

`left` and `right` are run-time numbers. None means that the side is unbounded, and compiles away. A causal mask has right = 0.
`shift` is 0 where the first query is aligned with the first key, and keys - queries where the last ones are.
"""

import triton
import triton.language as tl


@triton.jit
def first_tile(lo, F, BLOCK: tl.constexpr):
    """Where the first tile begins that covers rows from lo on.

    With dropout, a mask or a bias, tiles begin at multiples of their size: then no two tiles divide the keys that share random
    bits, or an aligned vector of the mask. Without them tiles begin at lo: knowing the multiple, the compiler would choose
    layouts that take more registers, and dK and dV with a causal mask would spill on sm_90.
    """
    if F.dropout is None and F.mask is None and F.bias is None:
        return lo
    else:
        return lo // BLOCK * BLOCK


@triton.jit
def key_range(start_m, end_m, n_k, shift, left, right, F, BLOCK_N: tl.constexpr):
    """The keys that queries [start_m, end_m) need: (lo, full_lo, full_hi, hi).

    [lo, hi) holds exactly the keys below n_k that at least one of the queries sees. It is empty where lo >= hi. Tiles of
    BLOCK_N keys begin at first_tile(lo). Those in [full_lo, full_hi) are whole, and all of the queries see all of their keys;
    the others need a mask. full_lo <= full_hi, and both may lie beyond hi.
    """
    lo = 0
    hi = n_k
    all_lo = 0
    all_hi = n_k
    if left is not None:
        lo = tl.maximum(start_m + shift - left, 0)
        all_lo = tl.maximum(end_m - 1 + shift - left, lo)
    if right is not None:
        hi = tl.minimum(end_m + shift + right, n_k)
        all_hi = tl.minimum(start_m + shift + right + 1, n_k)
    first = first_tile(lo, F, BLOCK_N)
    full_lo = first + (all_lo - first + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_hi = full_lo + tl.maximum(all_hi - full_lo, 0) // BLOCK_N * BLOCK_N
    return lo, full_lo, full_hi, hi


@triton.jit
def query_range(start_n, end_n, n_q, shift, left, right, F, BLOCK_M: tl.constexpr):
    """The queries that see keys [start_n, end_n), in the form of key_range. Query i sees key j where j - shift - right <= i <=
    j - shift + left."""
    return key_range(start_n, end_n, n_q, -shift, right, left, F, BLOCK_M)


@triton.jit
def parts(first, full_lo, full_hi, last):
    """(starts, stops) of the three parts of a loop over tiles from `first` to `last`: the tiles before the full ones, which
    cross one edge of the band; the full tiles, which need no mask; and the tiles behind them, which cross the other edge."""
    return (first, full_lo, full_hi), (tl.minimum(full_lo, last), full_hi, last)


@triton.jit
def all_tiles(full_lo, full_hi, n, BLOCK: tl.constexpr):
    """A range of key_range widened to all rows: (first, full_lo, full_hi, last) over tiles that begin at 0 and cover n rows."""
    lo = (full_lo + BLOCK - 1) // BLOCK * BLOCK
    return 0, lo, tl.maximum(full_hi // BLOCK * BLOCK, lo), n


@triton.jit
def visible(offs_m, offs_n, n_k, shift, left, right):
    """True where query offs_m sees key offs_n. The two index tensors broadcast against each other."""
    keep = (offs_n < n_k) & (offs_m >= 0)  # offs_m >= 0 always holds; it gives the mask both dimensions
    if left is not None:
        keep = keep & (offs_n >= offs_m + shift - left)
    if right is not None:
        keep = keep & (offs_n <= offs_m + shift + right)
    return keep
