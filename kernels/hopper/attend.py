"""What the forward kernels for Hopper share: how a consumer takes tiles of keys in, and how its results leave."""

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
from .loads import load, load_seen
from .parts import (
    accumulator,
    barriers,
    buffers,
    full_tiles,
    give_turn,
    hide_rows,
    stage_of,
    store_rows,
    survivors,
    take_turn,
    tma_store,
)


class Item(NamedTuple):
    """A tile of queries of one head, and the keys that it needs."""

    seq: Any
    h: Any
    bh: Any  # number of the head among those of all sequences
    start_m: Any  # first query
    scorer: Any
    keys: Any  # as of band.key_range
    first: Any  # first key of the first tile
    n_tiles: Any  # of keys
    count: Any  # tiles of keys that this program had before
    free: Any  # whether this consumer releases K and V, because it needs them no more


class Memory(NamedTuple):
    """Buffers of K and V, and the barriers that tell when they are full and empty."""

    ks: Any
    vs: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    cut: Any  # for V that the producer has to change


class Outputs(NamedTuple):
    """Where a forward kernel leaves its results; arguments as flash_fwd's."""

    o_desc: Any
    O: Any
    stride_o: Any
    STATS: Any


@gluon.jit
def allocate(k_desc, v_desc, C: gl.constexpr):
    """Memory for K and V, empty."""
    ks, vs = buffers(k_desc, C.STAGES), buffers(v_desc, C.STAGES)
    k_full, v_full = barriers(C.STAGES, 1), barriers(C.STAGES, 1)
    k_empty, v_empty = barriers(C.STAGES, C.CONSUMERS), barriers(C.STAGES, C.CONSUMERS)
    return Memory(ks, vs, k_full, k_empty, v_full, v_empty, barriers(1, 1).index(0))


@gluon.jit
def fetch(k_desc, v_desc, memory, seq, h_kv, start_n, lo, hi, n_k, count, cuts, C: gl.constexpr):
    """Load K and V of the tile of keys from start_n on, number `count` of a program, as soon as their buffers are empty. In V,
    keys outside [lo, hi) are zeroed. Returns cuts, how many tiles needed that so far."""
    stage, phase = stage_of(count, C.STAGES)
    at = [seq.at, h_kv, seq.k_row + start_n, 0]
    mbarrier.wait(memory.k_empty.index(stage), phase ^ 1)
    load((k_desc,), at, memory.k_full.index(stage), (memory.ks.index(stage),))
    mbarrier.wait(memory.v_empty.index(stage), phase ^ 1)
    # The barrier's address before V's: the other order takes 24 instructions more with a mask.
    v_full, v = memory.v_full.index(stage), memory.vs.index(stage)
    return load_seen((v_desc,), at, v_full, (v,), start_n, lo, hi, n_k, memory.cut, cuts)


@gluon.jit
def _softmax(s, m_i, l_i, v, v_full, phase, item, start_n, work, F, C: gl.constexpr, MASKED: gl.constexpr):
    """softmax.step of products s [BLOCK_M, BLOCK_N], with dropout. If a mask hides a key of the tile from all queries, wait for
    v and zero that key's row."""
    S_LAYOUT: gl.constexpr = s.type.layout
    offs_m = item.start_m + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, S_LAYOUT))
    offs_n = start_n + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, S_LAYOUT))
    s, keep, _slope = score.logits(
        s, offs_m[:, None], offs_n[None, :], item.start_m, start_n, F, item.scorer, work.left, work.right,
        C, MASKED, MASKED)  # fmt: skip
    if F.mask is not None or F.bias is not None:
        seen = gl.max(keep.to(gl.int32), 0)
        if gl.min(seen, 0) == 0:
            mbarrier.wait(v_full, phase)
            hide_rows(v, seen)
            fence_async_shared()
    p, alpha, m_i, l_i = softmax.step(gl.where(keep, s, float("-inf")), m_i, l_i, item.scorer)
    if F.dropout is not None:
        p = gl.where(survivors(F.dropout, item.bh, item.start_m, start_n, p), p, 0.0)
    return p, alpha, m_i, l_i


@gluon.jit
def _step(
    i, q, memory, acc, p, m_i, l_i, item, work, F,
    C: gl.constexpr, CONSUMER: gl.constexpr, FIRST: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of an item's tile i; unless it is the FIRST, also the product of the tile before it, whose P is p.
    Returns acc, P of tile i, m_i, l_i."""
    stage, now = stage_of(item.count + i, C.STAGES)
    before, phase = stage_of(item.count + i - 1, C.STAGES)
    IN_FLIGHT: gl.constexpr = 0 if FIRST else 1
    take_turn(CONSUMER, C.PINGPONG)
    zero = gl.zeros([C.BLOCK_M, C.BLOCK_N], gl.float32, accumulator(C.BLOCK_N))
    k = memory.ks.index(stage).reshape([C.BLOCK_N, C.BLOCK_D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
    if not FIRST:
        mbarrier.wait(memory.v_full.index(before), phase)
        v = memory.vs.index(before).reshape([C.BLOCK_N, C.BLOCK_D])
        acc = warpgroup_mma(p, v, acc, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
    give_turn(CONSUMER, C.PINGPONG)
    s = warpgroup_mma_wait(IN_FLIGHT, deps=(s,))
    mbarrier.arrive(memory.k_empty.index(stage), count=1, pred=item.free)
    v = memory.vs.index(stage).reshape([C.BLOCK_N, C.BLOCK_D])
    x, alpha, m_i, l_i = _softmax(
        s, m_i, l_i, v, memory.v_full.index(stage), now, item, item.first + i * C.BLOCK_N, work, F, C, MASKED)  # fmt: skip
    following = gl.convert_layout(x.to(v.dtype), p.type.layout)
    # A real branch: without one ptxas moves the wait below above the exponentials, and nothing overlaps.
    ahead, phase_ahead = stage_of(item.count + i + 1, C.STAGES)
    mbarrier.wait(memory.k_full.index(ahead), phase_ahead, pred=i + 1 < item.n_tiles)
    if not FIRST:
        acc, following = warpgroup_mma_wait(0, deps=(acc, following))
        mbarrier.arrive(memory.v_empty.index(before), count=1, pred=item.free)
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
        acc = acc * alpha[:, None]
    return acc, following, m_i, l_i


@gluon.jit
def attend(q, memory, acc, m_i, l_i, item, work, F, C: gl.constexpr, CONSUMER: gl.constexpr):
    """Take an item's tiles of keys, at least one, into (acc, m_i, l_i)."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    p = gl.zeros([C.BLOCK_M, C.BLOCK_N], memory.vs.dtype, P_LAYOUT)
    stage, phase = stage_of(item.count, C.STAGES)
    mbarrier.wait(memory.k_full.index(stage), phase)
    acc, p, m_i, l_i = _step(0, q, memory, acc, p, m_i, l_i, item, work, F, C, CONSUMER, True, True)
    begin, end = full_tiles(item.keys, item.first, item.n_tiles, C.BLOCK_N)
    starts, stops = (0, begin, end), (begin, end, item.n_tiles)
    for PART in gl.static_range(3):  # tiles that the left edge cuts, whole ones, and those that the right edge cuts
        if PART > 0 or work.left is not None:
            for i in range(gl.maximum(starts[PART], 1), stops[PART]):
                acc, p, m_i, l_i = _step(i, q, memory, acc, p, m_i, l_i, item, work, F, C, CONSUMER, False, PART != 1)
    stage, phase = stage_of(item.count + item.n_tiles - 1, C.STAGES)
    mbarrier.wait(memory.v_full.index(stage), phase)
    v = memory.vs.index(stage).reshape([C.BLOCK_N, C.BLOCK_D])
    acc = warpgroup_mma(p, v, acc, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(memory.v_empty.index(stage), count=1, pred=item.free)
    return acc, m_i, l_i


@gluon.jit
def finish(acc, m_i, l_i, outputs, buffer, item, work, F, C: gl.constexpr):
    """Store O and STATS of an item's queries. O leaves by way of `buffer`, after the O that was there before has left it."""
    seq = item.seq
    inverse = gl.convert_layout(1.0 / softmax.safe(l_i), gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    if F.dropout is not None:
        inverse *= F.dropout.factor
    tma.store_wait(0)
    o = (acc * inverse[:, None]).to(buffer.dtype)
    if F.cu_q is None:
        buffer.reshape([C.BLOCK_M, C.BLOCK_D]).store(o)
        fence_async_shared()
        tma_store(outputs.o_desc, [seq.at, item.h, item.start_m, 0], buffer)
    else:
        row, rows = seq.q_row + item.start_m, seq.n_q - item.start_m
        store_rows(o, outputs.O, outputs.stride_o, seq.at, item.h, row, rows, C.HEAD_DIM)
    offs_m = item.start_m + gl.arange(0, C.BLOCK_M, layout=m_i.type.layout)
    stats = softmax.stats_at(outputs.STATS, seq, item.h, work.heads, work.n_q, 2)
    softmax.store_stats(stats, offs_m, work.n_q, seq.n_q, m_i, l_i, 1.0)
