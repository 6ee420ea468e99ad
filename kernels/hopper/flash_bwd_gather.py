"""The gatherer of flash_bwd: dQ from the consumers' dS^T, and their dV and dK on the way out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

from .flash_bwd_parts import Tile, place, sent, slot_of, tiles_of
from .parts import accumulator, operand, reinterpret, stage_of, tma_store


@gluon.jit
def _partial(memory, slot, C: gl.constexpr):
    """A slot as dQ^T [BLOCK_D, BLOCK_M] in float32, swizzled so that a product's layout meets no bank conflicts."""
    return reinterpret(memory.slots.index(slot), gl.float32, [C.BLOCK_D, C.BLOCK_M], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))


@gluon.jit
def _deliver(desc, b, h_k, start_n, memory, number, C: gl.constexpr):
    """Send message number `number` of both consumers out: dV or dK of a block."""
    place, phase = stage_of(number, C.RING)
    mbarrier.wait(memory.ds_full.index(place), phase)
    for c in gl.static_range(2):
        tma_store(desc, [b, h_k, start_n + c * C.BLOCK_N, 0], memory.dss.index(2 * place + c))
    tma.store_wait(0)
    mbarrier.arrive(memory.ds_empty.index(place), count=1)


@gluon.jit
def _gather_tile(kt0, kt1, memory, tile, done, dq_desc, scorer, C: gl.constexpr):
    """Add a block's part to dQ of a tile of queries, from message number tile.number: to 0 if the tile is fresh. Send dQ out if
    it is `done`."""
    Q_LAYOUT: gl.constexpr = accumulator(C.BLOCK_M)
    slot = tile.use % C.TILES
    place, phase = stage_of(tile.number, C.RING)
    if tile.fresh:
        dqt = gl.zeros([C.BLOCK_D, C.BLOCK_M], gl.float32, Q_LAYOUT)
    else:
        dqt = _partial(memory, slot, C).load(Q_LAYOUT)
    mbarrier.wait(memory.ds_full.index(place), phase)
    ds0 = memory.dss.index(2 * place).reshape([C.BLOCK_N, C.BLOCK_M])
    ds1 = memory.dss.index(2 * place + 1).reshape([C.BLOCK_N, C.BLOCK_M])
    dqt = warpgroup_mma(kt0, ds0, dqt, is_async=True)  # [BLOCK_D, BLOCK_N] @ [BLOCK_N, BLOCK_M]
    dqt = warpgroup_mma(kt1, ds1, dqt, is_async=True)  # [BLOCK_D, BLOCK_N] @ [BLOCK_N, BLOCK_M]
    dqt = warpgroup_mma_wait(0, deps=(dqt,))
    mbarrier.arrive(memory.ds_empty.index(place), count=1)
    if done:
        tma.store_wait(0)  # that of the tile before: it has left its slot
        dq = slot_of(memory, slot, C)
        dq.reshape([C.BLOCK_M, C.BLOCK_D]).permute((1, 0)).store((dqt * scorer.scale).to(memory.qs.dtype))
        fence_async_shared()
        tma_store(dq_desc, [tile.b, tile.h, tile.start_m, 0], dq)
    else:
        _partial(memory, slot, C).store(dqt)


@gluon.jit
def gather(dq_desc, dk_desc, dv_desc, memory, work, F, C: gl.constexpr):
    """dQ of every item, and dV and dK, which the consumers sum."""
    KEYS: gl.constexpr = 2 * C.BLOCK_N
    A: gl.constexpr = operand(C.BLOCK_M)
    uses, blocks, count = 0, 0, 0  # slots, blocks and tiles so far
    for index in range(gl.program_id(0), work.items, gl.num_programs(0)):
        b, h_k, scorer = place(index, work, F, C)
        reached = 0
        for block in range(gl.cdiv(work.n_k, KEYS)):
            first, _, _, last = tiles_of(block, scorer, work, F, C)
            stays, _, _, _ = tiles_of(block + 1, scorer, work, F, C)
            mbarrier.wait(memory.kv_full, blocks & 1)
            kt0 = memory.ks.index(0).reshape([C.BLOCK_N, C.BLOCK_D]).permute((1, 0)).load(A)
            kt1 = memory.ks.index(1).reshape([C.BLOCK_N, C.BLOCK_D]).permute((1, 0)).load(A)
            mbarrier.arrive(memory.kv_empty, count=1)
            for member in range(work.group):
                for i in range(first, last):
                    use = uses + member * work.tiles + i
                    tile = Tile(b, h_k * work.group + member, i * C.BLOCK_M, sent(count, blocks), use, i >= reached)
                    _gather_tile(kt0, kt1, memory, tile, i < stays, dq_desc, scorer, C)
                    count += 1
            _deliver(dv_desc, b, h_k, block * KEYS, memory, sent(count, blocks), C)
            _deliver(dk_desc, b, h_k, block * KEYS, memory, sent(count, blocks) + 1, C)
            blocks += 1
            reached = gl.maximum(reached, last)
        uses += work.group * work.tiles
