"""dK and dV for Hopper. No atomics: the same inputs give the same bits.

A producer fetches tiles of queries by TMA and sends dK and dV out, each of one or two consumer warpgroups owns BLOCK_N = 64
keys and sums over the queries of its head, or of the whole group of heads that share the key. Scores are held transposed, so
that P^T and dS^T are operands in registers. A consumer issues S_i^T = K Q_i^T and dK += dS_{i-1}^T Q_{i-1} together, forms P_i
under the second and under dP_i^T = V dO_i^T, and forms dS_i under dV += P_i^T dO_i. Which queries see a key is as in
kernels/band.py.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .. import band, score, sequence, softmax, tile
from .flash_bwd_dkdv_consume import consume
from .loads import load, load_seen, zero_rows
from .parts import barriers, buffers, numbers, stage_of, tma_store
from .work import Static, Work

# Changing these numbers never recompiles.
RUN_TIME = ["stride_dk", "stride_dv", "batch", "heads", "group", "n_q", "n_k", "tiles", "align", "left", "right"]


class Item(NamedTuple):
    """A program's keys, and the queries that see them."""

    seq: Any
    h_k: Any  # head of keys
    start_n: Any  # first key
    scorer: Any  # of the first head of the group
    queries: Any  # as of band.query_range
    first: Any  # first query of the first tile
    seen_lo: Any  # keys that a query sees
    seen_hi: Any


class Memory(NamedTuple):
    """Buffers, and the barriers that tell when they are full and empty."""

    ks: Any  # K and V of each consumer, then its dK and dV
    vs: Any
    qs: Any  # tiles of queries
    dos: Any
    maxima: Any  # numbers of their rows: as softmax.load_maximum and load_log2_sum, and delta
    sums: Any
    deltas: Any
    kv_full: Any
    full: Any
    empty: Any
    cut: Any  # for tiles that the producer has to change
    done: Any  # dK and dV are in the memory of K and V


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, STATS, DELTA, memory, item, work, F, C: gl.constexpr
):  # fmt: skip
    """Fetch K and V once, then Q, dO, maxima, sums and delta of every tile of every head of the group, as soon as their buffers
    are empty. In the end send out dK and dV, which consumers leave in the memory of K and V."""
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    seq, first = item.seq, item.first
    lo, _full_lo, _full_hi, hi = item.queries
    for c in gl.static_range(C.CONSUMERS):
        at = [seq.at, item.h_k, seq.k_row + item.start_n + c * C.BLOCK_N, 0]
        load((k_desc, v_desc), at, memory.kv_full.index(c), (memory.ks.index(c), memory.vs.index(c)))
    n_tiles = gl.cdiv(gl.maximum(hi - first, 0), C.BLOCK_M)
    cuts = 0
    for member in range(work.group):
        h = item.h_k * work.group + member
        row = (seq.at * work.heads + h).to(gl.int64) * work.n_q + seq.q_row
        for i in range(n_tiles):
            stage, phase = stage_of(member * n_tiles + i, C.STAGES)
            start_m = first + i * C.BLOCK_M
            offs_m = start_m + gl.arange(0, C.BLOCK_M, layout=ROWS)
            stats = softmax.stats_at(STATS, seq, h, work.heads, work.n_q, 2)
            m = softmax.load_maximum(stats, offs_m, lo, hi, True)
            log2_l = softmax.load_log2_sum(stats, offs_m, work.n_q, lo, hi, True)
            delta = tile.load_row_values(DELTA + row, offs_m, lo, hi, 0.0, True)
            mbarrier.wait(memory.empty.index(stage), phase ^ 1)
            cuts = load_seen(  # rows counted from the tile's first: an instruction less than from the sequence's
                (q_desc, do_desc), [seq.at, h, seq.q_row + start_m, 0], memory.full.index(stage),
                (memory.qs.index(stage), memory.dos.index(stage)), 0, lo - start_m, hi - start_m, work.n_q,
                memory.cut, cuts)  # fmt: skip
            memory.maxima.index(stage).store(m)
            memory.sums.index(stage).store(log2_l)
            memory.deltas.index(stage).store(delta)
            mbarrier.arrive(memory.full.index(stage), count=1)
    if F.cu_k is None:
        _send_out(dk_desc, dv_desc, memory, item, C)


@gluon.jit
def _send_out(dk_desc, dv_desc, memory, item, C: gl.constexpr):
    """dK and dV of the consumers, as soon as they are in the memory of K and V; zeros for keys that no query sees."""
    for c in gl.static_range(C.CONSUMERS):
        mbarrier.wait(memory.done.index(c), 0)
        start = item.start_n + c * C.BLOCK_N
        if (start < item.seen_lo) | (start + C.BLOCK_N > item.seen_hi):
            zero_rows(memory.ks.index(c), item.seen_lo - start, item.seen_hi - start)
            zero_rows(memory.vs.index(c), item.seen_lo - start, item.seen_hi - start)
            fence_async_shared()
        tma_store(dk_desc, [item.seq.at, item.h_k, start, 0], memory.ks.index(c))
        tma_store(dv_desc, [item.seq.at, item.h_k, start, 0], memory.vs.index(c))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_bwd_dkdv(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, DK, DV, STATS, DELTA, F, stride_dk, stride_dv, batch, heads, group, n_q,
    n_k, tiles, scale, align, left, right, MOD: gl.constexpr, MOD_GRAD: gl.constexpr, LINEAR: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (batch * heads / group * tiles,), tiles = ceil(n_k / (CONSUMERS * BLOCK_N)); packed as in sequence.py.

    Descriptors of Q and dO (B, heads, n_q, HEAD_DIM) in blocks of (1, 1, BLOCK_M, BLOCK_D), of K, V, dK and dV (B, heads /
    group, n_k, HEAD_DIM) in blocks of (1, 1, BLOCK_N, BLOCK_D), HEAD_DIM <= BLOCK_D; dK and dV again, with their strides. STATS
    as in flash_fwd, and DELTA of flash_bwd_dq (B, heads, n_q), fp32 contiguous; F as in flash_fwd. Every key row is written:
    keys that no query sees, and keys that do not exist, get 0.
    """
    gl.static_assert(STAGES >= 3, "the next tile is waited for before the one before is free")
    C: gl.constexpr = Static(MOD=MOD, MOD_GRAD=MOD_GRAD, LINEAR=LINEAR, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M,
                             BLOCK_N=BLOCK_N, STAGES=STAGES, CONSUMERS=CONSUMERS)  # fmt: skip
    work = Work(scale, batch, heads, group, n_q, n_k, tiles, None, align, left, right)
    seq, h_k, start_n = sequence.locate_keys(F, gl.program_id(0), tiles, heads // group, batch, n_q, n_k, BLOCK_N * CONSUMERS)
    shift = align * (seq.n_k - seq.n_q)
    scorer = score.prepare(F, seq, h_k * group, scale, shift, C)
    end_n = gl.minimum(start_n + BLOCK_N * CONSUMERS, scorer.n_k)
    n_seen = gl.where(start_n < scorer.n_k, seq.n_q, 0)
    queries = band.query_range(start_n, end_n, n_seen, shift, left, right, F, BLOCK_M)
    first = band.first_tile(queries[0], F, BLOCK_M)
    # NaN in keys that no query sees, such as padding, reaches only their own rows of dK and dV, which are zeroed in the end.
    seen_lo, _, _, seen_hi = band.key_range(0, seq.n_q, scorer.n_k, shift, left, right, F, BLOCK_N)
    item = Item(seq, h_k, start_n, scorer, queries, first, seen_lo, seen_hi)
    ks, vs, qs, dos = buffers(k_desc, CONSUMERS), buffers(v_desc, CONSUMERS), buffers(q_desc, STAGES), buffers(do_desc, STAGES)
    maxima, sums, deltas = numbers(STAGES, BLOCK_M), numbers(STAGES, BLOCK_M), numbers(STAGES, BLOCK_M)
    # Of the two arrivals that make a tile full, one is for what comes by TMA, one for the others.
    kv_full, full, empty, cut = barriers(CONSUMERS, 1), barriers(STAGES, 2), barriers(STAGES, CONSUMERS), barriers(1, 1)
    done = barriers(CONSUMERS, 1)
    fence_async_shared()  # for the barriers
    memory = Memory(ks, vs, qs, dos, maxima, sums, deltas, kv_full, full, empty, cut.index(0), done)
    gl.warp_specialize([
        (_produce, (q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, STATS, DELTA, memory, item, work, F, C)),
        (consume, (DK, DV, stride_dk, stride_dv, memory, item, work, F, C, 0)),
        (consume, (DK, DV, stride_dk, stride_dv, memory, item, work, F, C, 1)),
    ][:CONSUMERS + 1], [4] * CONSUMERS, [REGISTERS] * CONSUMERS)  # fmt: skip
