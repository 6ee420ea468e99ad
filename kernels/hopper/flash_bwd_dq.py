"""dQ for Hopper, and the deltas that flash_bwd_dkdv reads. No atomics: the same inputs give the same bits.

A producer fetches tiles by TMA, each of one or two consumer warpgroups owns BLOCK_M = 64 queries. A consumer forms their delta
once. For each tile of keys it issues S_j = Q K_j^T, dP_j = dO V_j^T and dQ += dS_{j-1} K_{j-1} together, and forms P_j under
the last two. Which keys a query sees is as in kernels/band.py.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .. import band, score, sequence
from .flash_bwd_dq_consume import consume
from .loads import load, load_seen
from .parts import barriers, buffers, stage_of
from .work import Static, Work

# Changing these numbers never recompiles.
RUN_TIME = ["stride_dq", "batch", "heads", "group", "n_q", "n_k", "tiles", "align", "left", "right"]


class Item(NamedTuple):
    """A program's queries, and the keys that they need."""

    seq: Any
    h: Any
    start_m: Any  # first query
    scorer: Any
    keys: Any  # as of band.key_range
    first: Any  # first key of the first tile


class Memory(NamedTuple):
    """Buffers, and the barriers that tell when they are full and empty."""

    qs: Any  # Q, O and dO of each consumer
    os: Any
    dos: Any
    ks: Any  # tiles of keys
    vs: Any
    rows_full: Any
    full: Any
    empty: Any
    cut: Any  # for tiles that the producer has to change


class Tensors(NamedTuple):
    """What a consumer reads and writes by itself; arguments of flash_bwd_dq."""

    dq_desc: Any
    DQ: Any
    stride_dq: Any
    STATS: Any
    DLSE: Any
    DELTA: Any
    DSLOPES: Any


@gluon.jit
def _produce(q_desc, k_desc, v_desc, o_desc, do_desc, memory, item, work, C: gl.constexpr):
    """Fetch Q, O and dO once, then K and V of every tile as soon as their buffers are empty."""
    seq, first = item.seq, item.first
    lo, _full_lo, _full_hi, hi = item.keys
    for c in gl.static_range(C.CONSUMERS):
        at = [seq.at, item.h, seq.q_row + item.start_m + c * C.BLOCK_M, 0]
        rows = memory.os.index(c), memory.dos.index(c), memory.qs.index(c)
        load((o_desc, do_desc, q_desc), at, memory.rows_full.index(c), rows)
    cuts = 0
    for i in range(gl.cdiv(hi - first, C.BLOCK_N)):
        stage, phase = stage_of(i, C.STAGES)
        start_n = first + i * C.BLOCK_N
        mbarrier.wait(memory.empty.index(stage), phase ^ 1)
        cuts = load_seen(  # rows counted from the tile's first: fewer instructions than from the sequence's
            (k_desc, v_desc), [seq.at, item.h // work.group, seq.k_row + start_n, 0], memory.full.index(stage),
            (memory.ks.index(stage), memory.vs.index(stage)), 0, lo - start_n, hi - start_n, work.n_k,
            memory.cut, cuts)  # fmt: skip


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_bwd_dq(
    q_desc, k_desc, v_desc, o_desc, do_desc, dq_desc, DQ, STATS, DLSE, DELTA, DSLOPES, F, stride_dq, batch, heads, group, n_q,
    n_k, tiles, scale, align, left, right, MOD: gl.constexpr, MOD_GRAD: gl.constexpr, LINEAR: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (items,), and all arguments, as in flash_fwd; descriptors of dO and dQ as Q's, and dQ again, with its strides.
    Writes dQ, DELTA = rowsum(O * dO) - DLSE, and with slopes DSLOPES: each query's part of their gradient.

    DLSE, DELTA, DSLOPES (B, heads, n_q) fp32 contiguous. DLSE and DSLOPES may be None.
    """
    gl.static_assert(STAGES >= 3, "the next tile is waited for before the one before is free")
    C: gl.constexpr = Static(MOD=MOD, MOD_GRAD=MOD_GRAD, LINEAR=LINEAR, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M,
                             BLOCK_N=BLOCK_N, STAGES=STAGES, CONSUMERS=CONSUMERS)  # fmt: skip
    work = Work(scale, batch, heads, group, n_q, n_k, tiles, None, align, left, right)
    seq, h, start_m = sequence.locate_queries(F, gl.program_id(0), tiles, heads, batch, n_q, n_k, BLOCK_M * CONSUMERS)
    shift = align * (seq.n_k - seq.n_q)
    scorer = score.prepare(F, seq, h, scale, shift, C)
    end_m = gl.minimum(start_m + BLOCK_M * CONSUMERS, seq.n_q)
    keys = band.key_range(start_m, end_m, scorer.n_k, shift, left, right, F, BLOCK_N)
    item = Item(seq, h, start_m, scorer, keys, band.first_tile(keys[0], F, BLOCK_N))
    qs, os, dos = buffers(q_desc, CONSUMERS), buffers(o_desc, CONSUMERS), buffers(do_desc, CONSUMERS)
    ks, vs = buffers(k_desc, STAGES), buffers(v_desc, STAGES)
    rows_full, full, empty, cut = barriers(CONSUMERS, 1), barriers(STAGES, 1), barriers(STAGES, CONSUMERS), barriers(1, 1)
    fence_async_shared()  # for the barriers
    memory = Memory(qs, os, dos, ks, vs, rows_full, full, empty, cut.index(0))
    tensors = Tensors(dq_desc, DQ, stride_dq, STATS, DLSE, DELTA, DSLOPES)
    gl.warp_specialize([
        (_produce, (q_desc, k_desc, v_desc, o_desc, do_desc, memory, item, work, C)),
        (consume, (tensors, memory, item, work, F, C, 0)),
        (consume, (tensors, memory, item, work, F, C, 1)),
    ][:CONSUMERS + 1], [4] * CONSUMERS, [REGISTERS] * CONSUMERS)  # fmt: skip
