"""All causal and window geometry. Query i sees key j where i + shift - left <= j <= i + shift + right.

left and right are run-time numbers, or None for an unbounded side, which then costs nothing. Causal is right = 0. `shift`
is 0 where the first query is aligned with the first key, or keys - queries where the last ones are.
"""

import triton
import triton.language as tl


@triton.jit
def first_tile(lo, F, BLOCK: tl.constexpr):
    """Where the tiles that cover lo … begin. With dropout or a mask they lie on multiples of their size, so that keys that
    share random bits and aligned vectors of the mask never straddle two. Without, they begin at lo: knowing the multiple, the
    compiler picks layouts that take more registers (and spill: sm_90, dK and dV, causal)."""
    if F.dropout is None and F.mask is None and F.bias is None:
        return lo
    else:
        return lo // BLOCK * BLOCK


@triton.jit
def key_range(start_m, end_m, n_k, shift, left, right, F, BLOCK_N: tl.constexpr):
    """The keys that queries [start_m, end_m) need: (lo, full_lo, full_hi, hi).

    [lo, hi) holds exactly the keys below n_k that at least one of the queries sees. Of the tiles of BLOCK_N keys from
    first_tile(lo) on, those of [full_lo, full_hi) are whole and seen by all of the queries; those before full_lo and those from
    full_hi to hi are not. full_lo <= full_hi; both may lie beyond hi. An empty range has lo >= hi.
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
    """The queries that see keys [start_n, end_n), as key_range: key j is seen by j - shift - right <= i <= j - shift + left."""
    return key_range(start_n, end_n, n_q, -shift, right, left, F, BLOCK_M)


@triton.jit
def all_tiles(full_lo, full_hi, n, BLOCK: tl.constexpr):
    """A range of key_range as (first, full_lo, full_hi, last) over tiles that begin at 0 and cover all of n."""
    lo = (full_lo + BLOCK - 1) // BLOCK * BLOCK
    return 0, lo, tl.maximum(full_hi // BLOCK * BLOCK, lo), n


@triton.jit
def visible(offs_m, offs_n, n_k, shift, left, right):
    """True where query offs_m sees key offs_n; the two index tensors broadcast against each other."""
    keep = (offs_n < n_k) & (offs_m >= 0)  # the second is always so, and gives the mask both dimensions
    if left is not None:
        keep = keep & (offs_n >= offs_m + shift - left)
    if right is not None:
        keep = keep & (offs_n <= offs_m + shift + right)
    return keep
