"""Forward for Hopper where K and V of a head fit in shared memory: they stay there, and consumers go through its queries.

Each of three consumer warpgroups takes every third tile of BLOCK_M = 64 queries of all heads of a program, as if the tiles were
one long list. None waits for another, whatever the number of tiles of a head, and while one writes its output the others
multiply. A producer fetches K and V of the next head as far as they fit.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .. import band, score, sequence, softmax
from .attend import Item, Outputs, allocate, attend, fetch, finish
from .loads import load
from .parts import accumulator, barriers, buffers, meet, stage_of
from .work import Static, Work

# Changing these numbers never recompiles.
RUN_TIME = ["stride_o", "batch", "heads", "group", "n_q", "n_k", "tiles", "sets", "align", "right"]


class Queries(NamedTuple):
    """Q by its descriptor; buffers of Q and O, one of each a consumer, and the barriers that tell when those of Q are full."""

    q_desc: Any
    qs: Any
    os: Any
    full: Any


@gluon.jit
def _keys(set, work, F, C: gl.constexpr):
    """(sequence, key head, how many keys its queries need) of this program's `set`, a key head with all of its queries."""
    of = gl.program_id(0) + set * gl.num_programs(0)
    seq = sequence.of_batch(F, of // (work.heads // work.group), work.batch, work.n_q, work.n_k)
    shift = work.align * (seq.n_k - work.n_q)
    keys = band.key_range(0, work.n_q, seq.n_k, shift, work.left, work.right, F, C.BLOCK_N)
    return seq, of % (work.heads // work.group), keys[3]


@gluon.jit
def _produce(k_desc, v_desc, memory, work, F, C: gl.constexpr):
    """Fetch K and V of every set."""
    cuts, count = 0, 0  # tiles with rows zeroed, and tiles so far
    for set in range(gl.cdiv(work.items - gl.program_id(0), gl.num_programs(0))):
        seq, h_k, hi = _keys(set, work, F, C)
        for start_n in range(0, hi, C.BLOCK_N):
            cuts = fetch(k_desc, v_desc, memory, seq, h_k, start_n, 0, hi, work.n_k, count, cuts, C)
            count += 1


@gluon.jit
def _fetch_queries(number, queries, work, C: gl.constexpr, CONSUMER: gl.constexpr):
    """Load Q of this program's tile of queries `number`, if there is one."""
    heads, group, tiles = work.heads, work.group, work.tiles
    of = gl.program_id(0) + number // (group * tiles) * gl.num_programs(0)
    tile = number % (group * tiles)
    if of < work.items:
        b, h = of // (heads // group), of % (heads // group) * group + tile // tiles
        at = [b, h, (tiles - 1 - tile % tiles) * C.BLOCK_M, 0]
        load((queries.q_desc,), at, queries.full.index(CONSUMER), (queries.qs.index(CONSUMER),))


@gluon.jit
def _release(first, end, memory, C: gl.constexpr):
    """Give K and V of tiles [first, end) free, which this consumer does not need."""
    for i in range(first, end):
        stage, phase = stage_of(i, C.STAGES)
        mbarrier.wait(memory.k_full.index(stage), phase)  # else this might count as having read the tile before
        mbarrier.arrive(memory.k_empty.index(stage), count=1)
        mbarrier.wait(memory.v_full.index(stage), phase)
        mbarrier.arrive(memory.v_empty.index(stage), count=1)


@gluon.jit
def _item(place, seq, h_k, count, work, F, C: gl.constexpr):
    """Tile number `place` of a set, of whose K and V the first tile has number `count`. The last tiles of a head come first:
    under a causal mask they see most."""
    h, start_m = h_k * work.group + place // work.tiles, (work.tiles - 1 - place % work.tiles) * C.BLOCK_M
    last = place + C.CONSUMERS >= work.group * work.tiles
    shift = work.align * (seq.n_k - work.n_q)
    scorer = score.prepare(F, seq, h, score.scale_of(F, work.scale), shift, C)
    end_m = gl.minimum(start_m + C.BLOCK_M, work.n_q)
    keys = band.key_range(start_m, end_m, seq.n_k, shift, work.left, work.right, F, C.BLOCK_N)
    n_tiles = gl.cdiv(gl.maximum(keys[3], 0), C.BLOCK_N)
    return Item(seq, h, seq.b * work.heads + h, start_m, scorer, keys, 0, n_tiles, count, last)


@gluon.jit
def _consume(outputs, queries, memory, work, F, C: gl.constexpr, CONSUMER: gl.constexpr):
    """O and STATS of every CONSUMERS-th tile of queries."""
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(C.BLOCK_N))
    of_set = work.group * work.tiles
    count, own, number = 0, 0, CONSUMER  # tiles of keys of earlier sets; tiles of queries this consumer had; its next one
    _fetch_queries(number, queries, work, C, CONSUMER)
    for set in range(gl.cdiv(work.items - gl.program_id(0), gl.num_programs(0))):
        seq, h_k, needed = _keys(set, work, F, C)
        end = count + gl.cdiv(needed, C.BLOCK_N)
        if number >= (set + 1) * of_set:
            _release(count, end, memory, C)
        for place in range(number - set * of_set, of_set, C.CONSUMERS):
            item = _item(place, seq, h_k, count, work, F, C)
            acc = gl.zeros([C.BLOCK_M, C.BLOCK_D], gl.float32, accumulator(C.BLOCK_D))
            m_i, l_i = softmax.start(gl.zeros([C.BLOCK_M], gl.float32, ROWS), F.sinks, item.h, seq.real)
            mbarrier.wait(queries.full.index(CONSUMER), own & 1)
            if item.n_tiles > 0:
                q = queries.qs.index(CONSUMER).reshape([C.BLOCK_M, C.BLOCK_D])
                acc, m_i, l_i = attend(q, memory, acc, m_i, l_i, item, work, F, C, CONSUMER)
            meet()  # all warps of this consumer have read Q
            number += C.CONSUMERS
            own += 1
            _fetch_queries(number, queries, work, C, CONSUMER)
            if item.free:
                _release(count + item.n_tiles, end, memory, C)
            finish(acc, m_i, l_i, outputs, queries.os.index(CONSUMER), item, work, F, C)
        count = end
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_fwd_short(
    q_desc, k_desc, v_desc, o_desc, O, STATS, F, stride_o, batch, heads, group, n_q, n_k, tiles, sets, scale, align, right,
    MOD: gl.constexpr, LINEAR: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, which share `sets` = batch * heads / group; tiles = ceil(n_q / BLOCK_M).

    Arguments as flash_fwd's. Not for masks, biases, packed sequences, and keys hidden on the left. n_k <= STAGES * BLOCK_N.
    """
    C: gl.constexpr = Static(MOD=MOD, LINEAR=LINEAR, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
                             STAGES=STAGES, CONSUMERS=CONSUMERS)  # fmt: skip
    qs, os = buffers(q_desc, CONSUMERS), buffers(o_desc, CONSUMERS)
    memory = allocate(k_desc, v_desc, C)
    queries = Queries(q_desc, qs, os, barriers(CONSUMERS, 1))
    fence_async_shared()  # for the barriers
    outputs = Outputs(o_desc, O, stride_o, STATS)
    work = Work(scale, batch, heads, group, n_q, n_k, tiles, sets, align, None, right)
    gl.warp_specialize([
        (_produce, (k_desc, v_desc, memory, work, F, C)),
        (_consume, (outputs, queries, memory, work, F, C, 0)),
        (_consume, (outputs, queries, memory, work, F, C, 1)),
        (_consume, (outputs, queries, memory, work, F, C, 2)),
    ][:CONSUMERS + 1], [4] * CONSUMERS, [REGISTERS] * CONSUMERS)  # fmt: skip
