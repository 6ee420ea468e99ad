"""The consumers of flash_bwd_dkdv: dK and dV of their keys."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

from .. import score, softmax
from .parts import accumulator, full_tiles, operand, stage_of, store_rows, survivors_transposed


class Keys(NamedTuple):
    """A consumer's 64 keys."""

    k: Any  # K and V: in registers for head dims up to 64, else in shared memory
    v: Any
    buffer: Any  # number of their buffers
    start_n: Any
    total: Any  # tiles of queries, of all heads of the group


class Head(NamedTuple):
    """A head of queries of the group."""

    scorer: Any
    bh: Any  # its number among the heads of all sequences


@gluon.jit
def _step(
    t, keys, memory, dk, dv, ds, head, start_m, work, F, C: gl.constexpr, FIRST: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """dS and dV of tile number t, queries from start_m on, and, unless it is the FIRST, dK of the tile before it, whose dS^T is
    ds. Returns dk, dv, dS^T of tile t."""
    stage, phase = stage_of(t, C.STAGES)
    before, _ = stage_of(t - 1, C.STAGES)
    S_LAYOUT: gl.constexpr = accumulator(C.BLOCK_M)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    zero = gl.zeros([C.BLOCK_N, C.BLOCK_M], gl.float32, S_LAYOUT)
    k, v = keys.k, keys.v
    if C.BLOCK_D > 64:  # always keys.buffer, as t >= 0; loops would keep a constant's addresses of each step in registers
        k = memory.ks.index(keys.buffer + gl.minimum(t, 0)).reshape([C.BLOCK_N, C.BLOCK_D])
        v = memory.vs.index(keys.buffer + gl.minimum(t, 0)).reshape([C.BLOCK_N, C.BLOCK_D])
    q = memory.qs.index(stage).reshape([C.BLOCK_M, C.BLOCK_D])
    do = memory.dos.index(stage).reshape([C.BLOCK_M, C.BLOCK_D])
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
    m, log2_l = memory.maxima.index(stage).load(COLUMNS), memory.sums.index(stage).load(COLUMNS)
    if FIRST:
        s = warpgroup_mma_wait(0, deps=(s,))
    else:
        q_before = memory.qs.index(before).reshape([C.BLOCK_M, C.BLOCK_D])
        dk = warpgroup_mma(ds, q_before, dk, is_async=True)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
        s = warpgroup_mma_wait(1, deps=(s,))
    offs_m = start_m + gl.arange(0, C.BLOCK_M, layout=COLUMNS)
    offs_n = keys.start_n + gl.arange(0, C.BLOCK_N, layout=gl.SliceLayout(1, S_LAYOUT))
    s, keep, slope = score.logits(
        s, offs_m[None, :], offs_n[:, None], start_m, keys.start_n, F, head.scorer, work.left, work.right,
        C, MASKED, MASKED)  # fmt: skip
    p = softmax.weights(gl.where(keep, s, float("-inf")), m[None, :], log2_l[None, :], head.scorer)
    kept = p
    if F.dropout is not None:  # p is negative where it is dropped, so that one register holds both
        p = gl.where(survivors_transposed(F.dropout, head.bh, start_m, keys.start_n, p), p, -p)
        kept = gl.maximum(p, 0.0)
    mbarrier.wait(memory.full.index(stage), phase)  # already complete; this branch keeps ptxas from reordering
    delta = memory.deltas.index(stage).load(COLUMNS)[None, :]
    dp = zero
    if F.dropout is None:
        dp = zero - delta  # so that dP - delta comes out of the product
    dp = warpgroup_mma(v, do.permute((1, 0)), dp, is_async=True)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
    if not FIRST:
        dk, p = warpgroup_mma_wait(1, deps=(dk, p))
        mbarrier.arrive(memory.empty.index(before), count=1)
    pt = gl.convert_layout(kept.to(do.dtype), operand(C.BLOCK_D))
    dv = warpgroup_mma(pt, do, dv, is_async=True)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
    dp = warpgroup_mma_wait(1, deps=(dp,))
    if F.dropout is None:
        x = p * dp
    else:
        x = gl.maximum(p, 0.0) * (dp * F.dropout.factor) - gl.abs(p) * delta
    if F.softcap is not None or C.MOD is not None:
        x = gl.where(keep, x * slope, 0.0)
    following = gl.convert_layout(x.to(q.dtype), operand(C.BLOCK_D))
    # A real branch: without one ptxas moves the wait below above dS, and nothing overlaps.
    ahead, phase_ahead = stage_of(t + 1, C.STAGES)
    mbarrier.wait(memory.full.index(ahead), phase_ahead, pred=t + 1 < keys.total)
    dv, following = warpgroup_mma_wait(0, deps=(dv, following))
    return dk, dv, following


@gluon.jit
def _sum(k, v, memory, dk, dv, item, start_n, work, F, C: gl.constexpr, CONSUMER: gl.constexpr):
    """dk and dv of keys from start_n on, over all tiles of queries, of which there is one at least."""
    n_tiles = gl.cdiv(item.queries[3] - item.first, C.BLOCK_M)
    keys = Keys(k, v, CONSUMER, start_n, work.group * n_tiles)
    h = item.h_k * work.group
    bh = item.seq.b * work.heads + h
    ds = gl.zeros([C.BLOCK_N, C.BLOCK_M], memory.qs.dtype, operand(C.BLOCK_D))
    mbarrier.wait(memory.full.index(0), 0)
    head = Head(item.scorer, bh)
    dk, dv, ds = _step(0, keys, memory, dk, dv, ds, head, item.first, work, F, C, True, True)
    begin, end = full_tiles(item.queries, item.first, n_tiles, C.BLOCK_M)
    for member in range(work.group):
        scorer = score.prepare(F, item.seq, h + member, work.scale, item.scorer.shift, C)
        head = Head(scorer, bh + member)
        t = member * n_tiles
        done = gl.maximum(1 - member, 0)  # the first tile of the first head
        starts, stops = (done, begin, end), (begin, end, n_tiles)
        for PART in gl.static_range(3):  # tiles that the right edge cuts, whole ones, and those that the left edge cuts
            if PART > 0 or work.right is not None:
                for i in range(gl.maximum(starts[PART], done), stops[PART]):
                    start_m = item.first + i * C.BLOCK_M
                    dk, dv, ds = _step(t + i, keys, memory, dk, dv, ds, head, start_m, work, F, C, False, PART != 1)
    last, _ = stage_of(keys.total - 1, C.STAGES)
    q = memory.qs.index(last).reshape([C.BLOCK_M, C.BLOCK_D])
    dk = warpgroup_mma(ds, q, dk, is_async=True)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
    dk = warpgroup_mma_wait(0, deps=(dk,))
    return dk, dv


@gluon.jit
def consume(DK, DV, stride_dk, stride_dv, memory, item, work, F, C: gl.constexpr, CONSUMER: gl.constexpr):
    """All of 64 keys: dK and dV."""
    D_LAYOUT: gl.constexpr = accumulator(C.BLOCK_D)
    seq = item.seq
    start_n = item.start_n + CONSUMER * C.BLOCK_N
    k = memory.ks.index(CONSUMER).reshape([C.BLOCK_N, C.BLOCK_D])
    v = memory.vs.index(CONSUMER).reshape([C.BLOCK_N, C.BLOCK_D])
    dk = gl.zeros([C.BLOCK_N, C.BLOCK_D], gl.float32, D_LAYOUT)
    dv = gl.zeros([C.BLOCK_N, C.BLOCK_D], gl.float32, D_LAYOUT)
    mbarrier.wait(memory.kv_full.index(CONSUMER), 0)
    if C.BLOCK_D <= 64:
        k_a = k.load(operand(C.BLOCK_M))
        v_a = v.load(operand(C.BLOCK_M))
    else:
        k_a = k
        v_a = v
    if item.queries[3] > item.first:
        dk, dv = _sum(k_a, v_a, memory, dk, dv, item, start_n, work, F, C, CONSUMER)
    if F.dropout is not None:
        dv *= F.dropout.factor
    dk *= item.scorer.scale
    if F.cu_k is None:
        v.store(dv.to(v.dtype))
        k.store(dk.to(k.dtype))
        fence_async_shared()
        mbarrier.arrive(memory.done.index(CONSUMER), count=1)
    else:
        row, rows = seq.k_row + start_n, seq.n_k - start_n
        offs_n = start_n + gl.arange(0, C.BLOCK_N, layout=gl.SliceLayout(1, D_LAYOUT))
        seen = ((offs_n >= item.seen_lo) & (offs_n < item.seen_hi))[:, None]
        store_rows(gl.where(seen, dv, 0.0).to(v.dtype), DV, stride_dv, seq.at, item.h_k, row, rows, C.HEAD_DIM)
        store_rows(gl.where(seen, dk, 0.0).to(k.dtype), DK, stride_dk, seq.at, item.h_k, row, rows, C.HEAD_DIM)
