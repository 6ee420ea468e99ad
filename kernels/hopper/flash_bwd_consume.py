"""The consumers of flash_bwd: dV and dK of their keys, and a dS^T for each tile of queries, sent to the gatherer."""

from typing import Any, NamedTuple

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
from .parts import accumulator, operand, stage_of


class Keys(NamedTuple):
    """A consumer's keys of a block."""

    k: Any
    v: Any
    start_n: Any  # first key
    scorer: Any
    end: Any  # number of the tile of queries after the block's last
    blocks: Any  # blocks so far


@gluon.jit
def _send(x, memory, number, C: gl.constexpr, CONSUMER: gl.constexpr):
    """Leave x [BLOCK_N, 64] to the gatherer, as a consumer's message number `number`."""
    place, phase = stage_of(number, C.RING)
    mbarrier.wait(memory.ds_empty.index(place), phase ^ 1)
    memory.dss.index(2 * place + CONSUMER).reshape([C.BLOCK_N, x.shape[1]]).store(x)
    fence_async_shared()
    mbarrier.arrive(memory.ds_full.index(place), count=1)


@gluon.jit
def _step(
    count, keys, memory, dk, dv, ds, start_m, work, C: gl.constexpr, CONSUMER: gl.constexpr, FIRST: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """dS and dV of tile number `count`, queries from start_m on, and, unless it is the FIRST, dK of the tile before it, whose
    dS^T is ds. Returns dk, dv, dS^T of this tile."""
    stage, _ = stage_of(count, C.STAGES)
    before, _ = stage_of(count - 1, C.STAGES)
    do_stage, do_phase = stage_of(count, C.STAGES - 1)
    S_LAYOUT: gl.constexpr = accumulator(C.BLOCK_M)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    scorer = keys.scorer
    zero = gl.zeros([C.BLOCK_N, C.BLOCK_M], gl.float32, S_LAYOUT)
    q = memory.qs.index(stage).reshape([C.BLOCK_M, C.BLOCK_D])
    do = memory.dos.index(do_stage).reshape([C.BLOCK_M, C.BLOCK_D])
    s = warpgroup_mma(keys.k, q.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
    if FIRST:
        s = warpgroup_mma_wait(0, deps=(s,))
    else:
        q_before = memory.qs.index(before).reshape([C.BLOCK_M, C.BLOCK_D])
        dk = warpgroup_mma(ds, q_before, dk, is_async=True)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
        s = warpgroup_mma_wait(1, deps=(s,))
    # Maxima and sums one after the other: both at once take more registers than there are.
    x = softmax.exponent(s, memory.maxima.index(stage).load(COLUMNS)[None, :], scorer)
    if MASKED:
        offs_m = start_m + gl.arange(0, C.BLOCK_M, layout=COLUMNS)[None, :]
        offs_n = keys.start_n + gl.arange(0, C.BLOCK_N, layout=gl.SliceLayout(1, S_LAYOUT))[:, None]
        x = gl.where(band.visible(offs_m, offs_n, scorer.n_k, scorer.shift, work.left, work.right), x, float("-inf"))
    p = softmax.normalised(x, memory.sums.index(stage).load(COLUMNS)[None, :])
    mbarrier.wait(memory.do_full.index(do_stage), do_phase)
    dp = zero - memory.deltas.index(do_stage).load(COLUMNS)[None, :]  # so that dP - delta comes out of the product
    dp = warpgroup_mma(keys.v, do.permute((1, 0)), dp, is_async=True)  # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M]
    if not FIRST:
        dk, p = warpgroup_mma_wait(1, deps=(dk, p))
        mbarrier.arrive(memory.q_empty.index(before), count=1)
    pt = gl.convert_layout(p.to(do.dtype), operand(C.BLOCK_D))
    dv = warpgroup_mma(pt, do, dv, is_async=True)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
    dp = warpgroup_mma_wait(1, deps=(dp,))
    following = gl.convert_layout((p * dp).to(q.dtype), operand(C.BLOCK_D))
    _send(following, memory, sent(count, keys.blocks), C, CONSUMER)
    # A real branch: without one ptxas moves the wait below above dS, and nothing overlaps.
    ahead, phase_ahead = stage_of(count + 1, C.STAGES)
    mbarrier.wait(memory.q_full.index(ahead), phase_ahead, pred=count + 1 < keys.end)
    dv, following = warpgroup_mma_wait(0, deps=(dv, following))
    mbarrier.arrive(memory.do_empty.index(do_stage), count=1)
    return dk, dv, following


@gluon.jit
def _sum(k, v, memory, dk, dv, count, blocks, tiles, start_n, scorer, work, C: gl.constexpr, CONSUMER: gl.constexpr):
    """dK and dV of a block's keys over its `tiles` of queries, at least one."""
    first, begin, end, last = tiles
    stage, phase = stage_of(count, C.STAGES)
    mbarrier.wait(memory.q_full.index(stage), phase)
    each = last - first
    keys = Keys(k, v, start_n, scorer, count + work.group * each, blocks)
    ds = gl.zeros([C.BLOCK_N, C.BLOCK_M], memory.qs.dtype, operand(C.BLOCK_D))
    dk, dv, ds = _step(count, keys, memory, dk, dv, ds, first * C.BLOCK_M, work, C, CONSUMER, True, True)
    for member in range(work.group):
        t = count + member * each - first
        done = first + gl.maximum(1 - member, 0)  # with the first tile of the first head
        starts, stops = (done, begin, end), (begin, end, last)
        for PART in gl.static_range(3):  # tiles that the right edge cuts, whole ones, and those that the left edge cuts
            if PART > 0 or work.right is not None:
                for i in range(gl.maximum(starts[PART], done), stops[PART]):
                    dk, dv, ds = _step(
                        t + i, keys, memory, dk, dv, ds, i * C.BLOCK_M, work, C, CONSUMER, False, PART != 1)  # fmt: skip
    stage, _ = stage_of(keys.end - 1, C.STAGES)
    q = memory.qs.index(stage).reshape([C.BLOCK_M, C.BLOCK_D])
    dk = warpgroup_mma(ds, q, dk, is_async=True)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D]
    dk = warpgroup_mma_wait(0, deps=(dk,))
    mbarrier.arrive(memory.q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def consume(memory, work, F, C: gl.constexpr, CONSUMER: gl.constexpr):
    """dS^T, dV and dK of half of the keys of every block, as messages to the gatherer."""
    A: gl.constexpr = operand(C.BLOCK_M)
    blocks, count = 0, 0  # blocks and tiles of queries so far
    for index in range(gl.program_id(0), work.items, gl.num_programs(0)):
        _b, _h_k, scorer = place(index, work, F, C)
        for block in range(gl.cdiv(work.n_k, 2 * C.BLOCK_N)):
            tiles = tiles_of(block, scorer, work, F, C)
            dk = gl.zeros([C.BLOCK_N, C.BLOCK_D], gl.float32, accumulator(C.BLOCK_D))
            dv = gl.zeros([C.BLOCK_N, C.BLOCK_D], gl.float32, accumulator(C.BLOCK_D))
            mbarrier.wait(memory.kv_full, blocks & 1)
            k = memory.ks.index(CONSUMER).reshape([C.BLOCK_N, C.BLOCK_D]).load(A)
            v = memory.vs.index(CONSUMER).reshape([C.BLOCK_N, C.BLOCK_D]).load(A)
            mbarrier.arrive(memory.kv_empty, count=1)
            if tiles[3] > tiles[0]:
                start_n = block * (2 * C.BLOCK_N) + CONSUMER * C.BLOCK_N
                dk, dv = _sum(k, v, memory, dk, dv, count, blocks, tiles, start_n, scorer, work, C, CONSUMER)
                count += work.group * (tiles[3] - tiles[0])
            _send(dv.to(memory.ks.dtype), memory, sent(count, blocks), C, CONSUMER)
            _send((dk * scorer.scale).to(memory.ks.dtype), memory, sent(count, blocks) + 1, C, CONSUMER)
            blocks += 1
