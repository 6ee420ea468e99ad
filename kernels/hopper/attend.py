"""What the forward kernels for Hopper share: a tile's way into the sums of a consumer, and what leaves in the end."""

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
from ..static import Static
from .parts import (
    accumulator,
    give_turn,
    hide_rows,
    stage_of,
    store_rows,
    survivors,
    take_turn,
    tma_load,
    tma_store,
    zero_rows,
)


@gluon.jit
def fetch(
    k_desc, v_desc, memory, v_cut, seq, h_kv, start_n, lo, hi, n_k, count, cuts,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """K and V of the tile of keys from start_n on, number `count` of a program, as their buffers fall free. Rows beyond a
    tensor arrive as zeros; keys that are there, but outside of [lo, hi), are zeroed in V. Returns cuts, of tiles cut short."""
    ks, vs, k_full, k_empty, v_full, v_empty = memory
    stage, phase = stage_of(count, STAGES)
    row = seq.k_row + start_n
    mbarrier.wait(k_empty.index(stage), phase ^ 1)
    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
    tma_load(k_desc, [seq.at, h_kv, row, 0], k_full.index(stage), ks.index(stage))
    mbarrier.wait(v_empty.index(stage), phase ^ 1)
    if (start_n < lo) | (gl.minimum(row + BLOCK_N, n_k) > seq.k_row + hi):
        mbarrier.expect(v_cut, v_desc.block_type.nbytes)
        tma_load(v_desc, [seq.at, h_kv, row, 0], v_cut, vs.index(stage))
        mbarrier.wait(v_cut, cuts & 1)
        zero_rows(vs.index(stage).reshape([BLOCK_N, BLOCK_D]), lo - start_n, hi - start_n, BLOCK_N)
        fence_async_shared()
        mbarrier.arrive(v_full.index(stage), count=1)
        cuts += 1
    else:
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma_load(v_desc, [seq.at, h_kv, row, 0], v_full.index(stage), vs.index(stage))
    return cuts


@gluon.jit
def _softmax(
    s, m_i, l_i, v, v_full, phase, bh, start_m, start_n, F, scorer, left, right, MOD: gl.constexpr, LINEAR: gl.constexpr,
    MASK_VEC: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Take in products s [BLOCK_M, BLOCK_N] as softmax.step does. With a mask: where it hides a key of the tile from all
    queries, its row of v is zeroed, as soon as it is there."""
    S_LAYOUT: gl.constexpr = s.type.layout
    offs_m = start_m + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, S_LAYOUT))
    offs_n = start_n + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, S_LAYOUT))
    C: gl.constexpr = Static(MOD=MOD, LINEAR=LINEAR, MASK_VEC=MASK_VEC)
    s, keep, _slope = score.logits(
        s, offs_m[:, None], offs_n[None, :], start_m, start_n, F, scorer, left, right, C, MASKED, MASKED)  # fmt: skip
    if F.mask is not None or F.bias is not None:
        seen = gl.max(keep.to(gl.int32), 0)
        if gl.min(seen, 0) == 0:
            mbarrier.wait(v_full, phase)
            hide_rows(v, seen)
            fence_async_shared()
    p, alpha, m_i, l_i = softmax.step(gl.where(keep, s, float("-inf")), m_i, l_i, scorer)
    if F.dropout is not None:
        p = gl.where(survivors(F.dropout, bh, start_m, start_n, p), p, 0.0)
    return p, alpha, m_i, l_i


@gluon.jit
def _step(
    i, count, q, memory, acc, p, m_i, l_i, bh, start_m, first, n_tiles, free, F, scorer, left, right, MOD: gl.constexpr,
    LINEAR: gl.constexpr, MASK_VEC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER: gl.constexpr, PINGPONG: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The scores and softmax of an item's tile i, before which `count` tiles came, and the product of the tile before it,
    whose P is p."""
    ks, vs, k_full, k_empty, v_full, v_empty = memory
    stage, now = stage_of(count + i, STAGES)
    before, phase = stage_of(count + i - 1, STAGES)
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    take_turn(CONSUMER, PINGPONG)
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    k = ks.index(stage).reshape([BLOCK_N, BLOCK_D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
    mbarrier.wait(v_full.index(before), phase)
    v = vs.index(before).reshape([BLOCK_N, BLOCK_D])
    acc = warpgroup_mma(p, v, acc, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
    give_turn(CONSUMER, PINGPONG)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1, pred=free)
    v = vs.index(stage).reshape([BLOCK_N, BLOCK_D])
    x, alpha, m_i, l_i = _softmax(
        s, m_i, l_i, v, v_full.index(stage), now, bh, start_m, first + i * BLOCK_N, F, scorer, left, right,
        MOD, LINEAR, MASK_VEC, MASKED)  # fmt: skip
    following = gl.convert_layout(x.to(v.dtype), p.type.layout)
    # A real branch: without one ptxas moves the wait below above the exponentials, and nothing overlaps.
    stage, phase = stage_of(count + i + 1, STAGES)
    mbarrier.wait(k_full.index(stage), phase, pred=i + 1 < n_tiles)
    acc, following = warpgroup_mma_wait(0, deps=(acc, following))
    mbarrier.arrive(v_empty.index(before), count=1, pred=free)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    return acc * alpha[:, None], following, m_i, l_i


@gluon.jit
def attend(
    q, memory, acc, m_i, l_i, count, n_tiles, free, bh, start_m, first, keys, F, scorer, left, right, MOD: gl.constexpr,
    LINEAR: gl.constexpr, MASK_VEC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """Take an item's n_tiles > 0 tiles of keys, before which `count` tiles came, into (acc, m_i, l_i); free: this consumer
    needs them no more."""
    ks, vs, k_full, k_empty, v_full, v_empty = memory
    _lo, full_lo, full_hi, _hi = keys
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    stage, phase = stage_of(count, STAGES)
    mbarrier.wait(k_full.index(stage), phase)
    take_turn(CONSUMER, PINGPONG)
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    k = ks.index(stage).reshape([BLOCK_N, BLOCK_D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N]
    give_turn(CONSUMER, PINGPONG)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1, pred=free)
    v = vs.index(stage).reshape([BLOCK_N, BLOCK_D])
    x, _alpha, m_i, l_i = _softmax(
        s, m_i, l_i, v, v_full.index(stage), phase, bh, start_m, first, F, scorer, left, right,
        MOD, LINEAR, MASK_VEC, True)  # fmt: skip
    p = gl.convert_layout(x.to(vs.dtype), P_LAYOUT)
    stage, phase = stage_of(count + 1, STAGES)
    mbarrier.wait(k_full.index(stage), phase, pred=n_tiles > 1)
    full_begin = gl.minimum((full_lo - first) // BLOCK_N, n_tiles)
    full_end = gl.minimum(gl.maximum((full_hi - first) // BLOCK_N, full_begin), n_tiles)
    if left is not None:
        for i in range(1, full_begin):
            acc, p, m_i, l_i = _step(
                i, count, q, memory, acc, p, m_i, l_i, bh, start_m, first, n_tiles, free, F, scorer, left, right, MOD, LINEAR,
                MASK_VEC, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMER, PINGPONG, True)  # fmt: skip
    for i in range(gl.maximum(full_begin, 1), full_end):
        acc, p, m_i, l_i = _step(
            i, count, q, memory, acc, p, m_i, l_i, bh, start_m, first, n_tiles, free, F, scorer, left, right, MOD, LINEAR,
            MASK_VEC, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMER, PINGPONG, False)  # fmt: skip
    for i in range(gl.maximum(full_end, 1), n_tiles):
        acc, p, m_i, l_i = _step(
            i, count, q, memory, acc, p, m_i, l_i, bh, start_m, first, n_tiles, free, F, scorer, left, right, MOD, LINEAR,
            MASK_VEC, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMER, PINGPONG, True)  # fmt: skip
    stage, phase = stage_of(count + n_tiles - 1, STAGES)
    mbarrier.wait(v_full.index(stage), phase)
    v = vs.index(stage).reshape([BLOCK_N, BLOCK_D])
    acc = warpgroup_mma(p, v, acc, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D]
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(stage), count=1, pred=free)
    return acc, m_i, l_i


@gluon.jit
def finish(
    acc, m_i, l_i, o_desc, O, STATS, stride_o, buffer, seq, h, heads, start_m, n_q, F,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """O and STATS of a consumer's queries from start_m on. O leaves by way of `buffer`, which the one before has left."""
    ROWS: gl.constexpr = m_i.type.layout
    inverse = gl.convert_layout(1.0 / softmax.safe(l_i), gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    if F.dropout is not None:
        inverse *= F.dropout.factor
    tma.store_wait(0)
    o = (acc * inverse[:, None]).to(buffer.dtype)
    if F.cu_q is None:
        buffer.reshape([BLOCK_M, BLOCK_D]).store(o)
        fence_async_shared()
        tma_store(o_desc, [seq.at, h, start_m, 0], buffer)
    else:
        store_rows(o, O, stride_o, seq.at, h, seq.q_row + start_m, seq.n_q - start_m, HEAD_DIM)
    offs_m = start_m + gl.arange(0, BLOCK_M, layout=ROWS)
    softmax.store_stats(softmax.stats_at(STATS, seq, h, heads, n_q, 2), offs_m, n_q, seq.n_q, m_i, l_i, 1.0)
