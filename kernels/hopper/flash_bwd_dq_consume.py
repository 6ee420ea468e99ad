"""The consumers of flash_bwd_dq: dQ of their queries, with DELTA and DSLOPES."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

from .. import score, softmax
from .parts import accumulator, full_tiles, operand, stage_of, store_rows, survivors, tma_store


class Queries(NamedTuple):
    """A consumer's 64 queries, their dO, and the numbers of each row."""

    q: Any
    do: Any
    bh: Any  # number of the head among those of all sequences
    start_m: Any
    m: Any
    log2_l: Any
    delta: Any


@gluon.jit
def _step(
    i, queries, memory, dq, ds, dslope, item, n_tiles, work, F, C: gl.constexpr, FIRST: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """dS of tile i and, unless it is the FIRST, the product of the tile before it, whose dS is ds. Returns dq, dS of tile i,
    dslope."""
    stage, phase = stage_of(i, C.STAGES)
    before, _ = stage_of(i - 1, C.STAGES)
    S_LAYOUT: gl.constexpr = accumulator(C.BLOCK_N)
    IN_FLIGHT: gl.constexpr = 1 if FIRST else 2
    zero = gl.zeros([C.BLOCK_M, C.BLOCK_N], gl.float32, S_LAYOUT)
    k = memory.ks.index(stage).reshape([C.BLOCK_N, C.BLOCK_D])
    v = memory.vs.index(stage).reshape([C.BLOCK_N, C.BLOCK_D])
    # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N], both
    s = warpgroup_mma(queries.q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(queries.do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    if not FIRST:
        k_before = memory.ks.index(before).reshape([C.BLOCK_N, C.BLOCK_D])
        dq = warpgroup_mma(ds, k_before, dq, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
    s = warpgroup_mma_wait(IN_FLIGHT, deps=(s,))
    start_n = item.first + i * C.BLOCK_N
    offs_m = queries.start_m + gl.arange(0, C.BLOCK_M, layout=gl.SliceLayout(1, S_LAYOUT))
    offs_n = start_n + gl.arange(0, C.BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    s, keep, slope = score.logits(
        s, offs_m[:, None], offs_n[None, :], queries.start_m, start_n, F, item.scorer, work.left, work.right,
        C, MASKED, MASKED)  # fmt: skip
    p = softmax.weights(gl.where(keep, s, float("-inf")), queries.m[:, None], queries.log2_l[:, None], item.scorer)
    if F.dropout is not None:
        kept = survivors(F.dropout, queries.bh, queries.start_m, start_n, p)
    # A real branch: without one ptxas moves the wait below above the exponentials, and nothing overlaps.
    ahead, phase_ahead = stage_of(i + 1, C.STAGES)
    mbarrier.wait(memory.full.index(ahead), phase_ahead, pred=i + 1 < n_tiles)
    dp, p = warpgroup_mma_wait(IN_FLIGHT - 1, deps=(dp, p))
    if F.dropout is not None:
        dp = gl.where(kept, dp * F.dropout.factor, 0.0)
    x = p * (dp - queries.delta[:, None])
    if F.slopes is not None:
        dslope -= gl.sum(x * score.distance(offs_m[:, None], offs_n[None, :], item.scorer), 1)
    if F.softcap is not None or C.MOD is not None:
        x = x * slope
    if F.softcap is not None or C.MOD is not None or F.sinks is not None:  # slope may be NaN; and a sink is a maximum
        x = gl.where(keep, x, 0.0)
    following = gl.convert_layout(x.to(memory.ks.dtype), operand(C.BLOCK_D))
    if not FIRST:
        mbarrier.wait(memory.full.index(stage), phase)  # already complete; this branch keeps ptxas from reordering
        dq, following = warpgroup_mma_wait(0, deps=(dq, following))
        mbarrier.arrive(memory.empty.index(before), count=1)
    return dq, following, dslope


@gluon.jit
def _sum(queries, memory, dq, dslope, item, work, F, C: gl.constexpr):
    """dq and dslope over all tiles of keys, of which there is one at least."""
    n_tiles = gl.cdiv(item.keys[3] - item.first, C.BLOCK_N)
    ds = gl.zeros([C.BLOCK_M, C.BLOCK_N], memory.ks.dtype, operand(C.BLOCK_D))
    mbarrier.wait(memory.full.index(0), 0)
    dq, ds, dslope = _step(0, queries, memory, dq, ds, dslope, item, n_tiles, work, F, C, True, True)
    begin, end = full_tiles(item.keys, item.first, n_tiles, C.BLOCK_N)
    starts, stops = (0, begin, end), (begin, end, n_tiles)
    for PART in gl.static_range(3):  # tiles that the left edge cuts, whole ones, and those that the right edge cuts
        if PART > 0 or work.left is not None:
            for i in range(gl.maximum(starts[PART], 1), stops[PART]):
                dq, ds, dslope = _step(i, queries, memory, dq, ds, dslope, item, n_tiles, work, F, C, False, PART != 1)
    last, _ = stage_of(n_tiles - 1, C.STAGES)
    k = memory.ks.index(last).reshape([C.BLOCK_N, C.BLOCK_D])
    dq = warpgroup_mma(ds, k, dq, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
    dq = warpgroup_mma_wait(0, deps=(dq,))
    return dq, dslope


@gluon.jit
def consume(tensors, memory, item, work, F, C: gl.constexpr, CONSUMER: gl.constexpr):
    """All of 64 queries: dQ, DELTA, DSLOPES."""
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(C.BLOCK_N))
    D_LAYOUT: gl.constexpr = accumulator(C.BLOCK_D)
    seq, h = item.seq, item.h
    start_m = item.start_m + CONSUMER * C.BLOCK_M
    q = memory.qs.index(CONSUMER).reshape([C.BLOCK_M, C.BLOCK_D])
    do = memory.dos.index(CONSUMER).reshape([C.BLOCK_M, C.BLOCK_D])
    offs_m = start_m + gl.arange(0, C.BLOCK_M, layout=ROWS)
    there = offs_m < seq.n_q
    row = (seq.at * work.heads + h).to(gl.int64) * work.n_q + seq.q_row
    stats = softmax.stats_at(tensors.STATS, seq, h, work.heads, work.n_q, 2)
    m = softmax.load_maximum(stats, offs_m, 0, seq.n_q, True)
    log2_l = softmax.load_log2_sum(stats, offs_m, work.n_q, 0, seq.n_q, True)
    mbarrier.wait(memory.rows_full.index(CONSUMER), 0)
    if C.BLOCK_D <= 64:
        q_a = q.load(operand(C.BLOCK_N))
        do_a = do.load(operand(C.BLOCK_N))
    else:
        q_a = q
        do_a = do
    o = memory.os.index(CONSUMER).reshape([C.BLOCK_M, C.BLOCK_D]).load(D_LAYOUT)
    delta = gl.convert_layout(softmax.delta(o, do.load(D_LAYOUT), F), ROWS, assert_trivial=True)
    if tensors.DLSE is not None:
        delta -= gl.load(tensors.DLSE + row + offs_m, mask=there, other=0.0)
    gl.store(tensors.DELTA + row + offs_m, delta, mask=there)
    dq = gl.zeros([C.BLOCK_M, C.BLOCK_D], gl.float32, D_LAYOUT)
    dslope = gl.zeros([C.BLOCK_M], gl.float32, ROWS)
    if item.keys[3] > item.first:
        queries = Queries(q_a, do_a, seq.b * work.heads + h, start_m, m, log2_l, delta)
        dq, dslope = _sum(queries, memory, dq, dslope, item, work, F, C)
    # Rows that see no key may have summed NaN: they get 0.
    live = log2_l < float("inf")
    if tensors.DSLOPES is not None:
        gl.store(tensors.DSLOPES + row + offs_m, gl.where(live, dslope, 0.0), mask=there)
    live = gl.convert_layout(live, gl.SliceLayout(1, D_LAYOUT), assert_trivial=True)[:, None]
    dq = gl.where(live, dq * item.scorer.scale, 0.0).to(q.dtype)
    if F.cu_q is None:
        q.store(dq)  # Q is not needed any more
        fence_async_shared()
        tma_store(tensors.dq_desc, [seq.at, h, start_m, 0], memory.qs.index(CONSUMER))
        tma.store_wait(0)
    else:
        store_rows(dq, tensors.DQ, tensors.stride_dq, seq.at, h, seq.q_row + start_m, seq.n_q - start_m, C.HEAD_DIM)
