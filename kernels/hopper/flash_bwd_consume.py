"""The consumers of flash_bwd: dV and dK of their keys, and a dS^T for each tile of queries, left to the gatherer."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

from .. import band, softmax
from .flash_bwd_parts import place, sent, tiles_of
from .parts import accumulator, stage_of


@gluon.jit
def _send(x, memory, number, CONSUMER: gl.constexpr, RING: gl.constexpr, BLOCK_N: gl.constexpr):
    """Leave x [BLOCK_N, 64] to the gatherer, as a consumer's message number `number`."""
    place, phase = stage_of(number, RING)
    mbarrier.wait(memory.ds_empty.index(place), phase ^ 1)
    memory.dss.index(2 * place + CONSUMER).reshape([BLOCK_N, x.shape[1]]).store(x)
    fence_async_shared()
    mbarrier.arrive(memory.ds_full.index(place), count=1)


@gluon.jit
def _step(
    count, end, blocks, k, v, memory, dk, dv, ds, start_m, start_n, scorer, left, right, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, CONSUMER: gl.constexpr,
    FIRST: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dS and dV of tile number `count`, queries from start_m on, and dK of the tile before it, whose dS^T is ds. This block has
    tiles up to number `end`; before it came `blocks`."""
    stage, _ = stage_of(count, STAGES)
    before, _ = stage_of(count - 1, STAGES)
    do_stage, do_phase = stage_of(count, STAGES - 1)
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_M)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_D), k_width=2)
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S_LAYOUT)
    q = memory.qs.index(stage).reshape([BLOCK_M, BLOCK_D])
    do = memory.dos.index(do_stage).reshape([BLOCK_M, BLOCK_D])
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
    if FIRST:
        s = warpgroup_mma_wait(0, deps=(s,))
    else:
        dk = warpgroup_mma(
            ds, memory.qs.index(before).reshape([BLOCK_M, BLOCK_D]), dk, is_async=True
        )  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
        s = warpgroup_mma_wait(1, deps=(s,))
    # Maxima and sums one after the other: both at once take more registers than there are.
    x = softmax.exponent(s, memory.maxima.index(stage).load(COLUMNS)[None, :], scorer)
    if MASKED:
        offs_m = start_m + gl.arange(0, BLOCK_M, layout=COLUMNS)
        offs_n = start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, S_LAYOUT))
        x = gl.where(band.visible(offs_m[None, :], offs_n[:, None], scorer.n_k, scorer.shift, left, right), x, float("-inf"))
    p = softmax.normalised(x, memory.sums.index(stage).load(COLUMNS)[None, :])
    mbarrier.wait(memory.do_full.index(do_stage), do_phase)
    dp = zero - memory.deltas.index(do_stage).load(COLUMNS)[None, :]  # so that dP - delta comes out of the product
    dp = warpgroup_mma(v, do.permute((1, 0)), dp, is_async=True)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
    if not FIRST:
        dk, p = warpgroup_mma_wait(1, deps=(dk, p))
        mbarrier.arrive(memory.q_empty.index(before), count=1)
    pt = gl.convert_layout(p.to(do.dtype), A_LAYOUT)
    dv = warpgroup_mma(pt, do, dv, is_async=True)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
    dp = warpgroup_mma_wait(1, deps=(dp,))
    following = gl.convert_layout((p * dp).to(q.dtype), A_LAYOUT)
    _send(following, memory, sent(count, blocks), CONSUMER, RING, BLOCK_N)
    # A real branch: without one ptxas moves the wait below above dS, and nothing overlaps.
    ahead, phase_ahead = stage_of(count + 1, STAGES)
    mbarrier.wait(memory.q_full.index(ahead), phase_ahead, pred=count + 1 < end)
    dv, following = warpgroup_mma_wait(0, deps=(dv, following))
    mbarrier.arrive(memory.do_empty.index(do_stage), count=1)
    return dk, dv, following


@gluon.jit
def _sum(
    k, v, memory, group, count, blocks, tiles, start_n, dk, dv, scorer, left, right, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """dK and dV of a block's keys over its `tiles` of queries, at least one."""
    first, full_begin, full_end, last = tiles
    stage, phase = stage_of(count, STAGES)
    mbarrier.wait(memory.q_full.index(stage), phase)
    each = last - first
    end = count + group * each
    ds = gl.zeros(
        [BLOCK_N, BLOCK_M], memory.qs.dtype, gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_D), k_width=2)
    )
    dk, dv, ds = _step(count, end, blocks, k, v, memory, dk, dv, ds, first * BLOCK_M, start_n, scorer, left, right,
                       BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RING, CONSUMER, True, True)  # fmt: skip
    for member in range(group):
        t = count + member * each - first
        begin = first + gl.maximum(1 - member, 0)
        if right is not None:
            for i in range(begin, full_begin):
                dk, dv, ds = _step(t + i, end, blocks, k, v, memory, dk, dv, ds, i * BLOCK_M, start_n, scorer, left, right,
                                   BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RING, CONSUMER, False, True)  # fmt: skip
        for i in range(gl.maximum(full_begin, begin), full_end):
            dk, dv, ds = _step(t + i, end, blocks, k, v, memory, dk, dv, ds, i * BLOCK_M, start_n, scorer, left, right,
                               BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RING, CONSUMER, False, False)  # fmt: skip
        for i in range(gl.maximum(full_end, begin), last):
            dk, dv, ds = _step(t + i, end, blocks, k, v, memory, dk, dv, ds, i * BLOCK_M, start_n, scorer, left, right,
                               BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RING, CONSUMER, False, True)  # fmt: skip
    stage, _ = stage_of(end - 1, STAGES)
    dk = warpgroup_mma(
        ds, memory.qs.index(stage).reshape([BLOCK_M, BLOCK_D]), dk, is_async=True
    )  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
    dk = warpgroup_mma_wait(0, deps=(dk,))
    mbarrier.arrive(memory.q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def consume(
    memory, work, F, left, right, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    RING: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """dS^T, dV and dK of half of the keys of every block, as messages to the gatherer."""
    KEYS: gl.constexpr = 2 * BLOCK_N
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(BLOCK_M), k_width=2)
    blocks, count = 0, 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        _b, _h_k, scorer = place(item, F, work)
        for block in range(gl.cdiv(work.n_k, KEYS)):
            tiles = tiles_of(block, scorer, F, work, left, right, BLOCK_M, KEYS)
            dk = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, accumulator(BLOCK_D))
            dv = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, accumulator(BLOCK_D))
            mbarrier.wait(memory.kv_full, blocks & 1)
            k = memory.ks.index(CONSUMER).reshape([BLOCK_N, BLOCK_D]).load(A)
            v = memory.vs.index(CONSUMER).reshape([BLOCK_N, BLOCK_D]).load(A)
            mbarrier.arrive(memory.kv_empty, count=1)
            if tiles[3] > tiles[0]:
                dk, dv = _sum(k, v, memory, work.group, count, blocks, tiles, block * KEYS + CONSUMER * BLOCK_N, dk, dv, scorer,
                              left, right, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RING, CONSUMER)  # fmt: skip
                count += work.group * (tiles[3] - tiles[0])
            _send(dv.to(memory.ks.dtype), memory, sent(count, blocks), CONSUMER, RING, BLOCK_N)
            _send((dk * scorer.scale).to(memory.ks.dtype), memory, sent(count, blocks) + 1, CONSUMER, RING, BLOCK_N)
            blocks += 1
