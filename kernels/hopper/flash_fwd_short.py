"""Forward for Hopper where K and V of a head fit in shared memory: they stay there, and consumers go through its queries.

Each of three consumer warpgroups takes every third tile of BLOCK_M = 64 queries of all heads of a program, one
behind the other, as if there were one long list: none waits for another, whatever the number of tiles of a head, and while
one writes its output the others multiply. A producer is ahead with K and V of the next head as far as they fit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .. import band, score, sequence, softmax
from ..static import Static
from .attend import attend, fetch, finish
from .parts import accumulator, barriers, meet, stage_of, tma_load

# Changing these numbers never recompiles.
RUN_TIME = ["stride_o", "batch", "heads", "group", "n_q", "n_k", "tiles", "sets", "align", "right"]


@gluon.jit
def _keys(set, F, work, right, BLOCK_N: gl.constexpr):
    """(sequence, key head, how many keys its queries need) of this program's `set`, a key head with all of its queries."""
    _scale, batch, heads, group, n_q, n_k, _tiles, _sets, align = work
    of = gl.program_id(0) + set * gl.num_programs(0)
    seq = sequence.of_batch(F, of // (heads // group), batch, n_q, n_k)
    keys = band.key_range(0, n_q, seq.n_k, align * (seq.n_k - n_q), None, right, F, BLOCK_N)
    return seq, of % (heads // group), keys[3]


@gluon.jit
def _produce(
    k_desc, v_desc, memory, v_cut, work, F, right, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Fetch K and V of every set."""
    _scale, _batch, _heads, _group, _n_q, n_k, _tiles, sets, _align = work
    cuts, count = 0, 0  # of tiles cut short, of tiles so far
    for set in range(gl.cdiv(sets - gl.program_id(0), gl.num_programs(0))):
        seq, h_k, hi = _keys(set, F, work, right, BLOCK_N)
        for start_n in range(0, hi, BLOCK_N):
            cuts = fetch(k_desc, v_desc, memory, v_cut, seq, h_k, start_n, 0, hi, n_k, count, cuts, BLOCK_N, BLOCK_D, STAGES)
            count += 1


@gluon.jit
def _fetch_queries(number, q_desc, queries, work, BLOCK_M: gl.constexpr, CONSUMER: gl.constexpr):
    """Ask for Q of this program's tile of queries `number`, if there is one."""
    qs, _os, q_full = queries
    _scale, _batch, heads, group, _n_q, _n_k, tiles, sets, _align = work
    of = gl.program_id(0) + number // (group * tiles) * gl.num_programs(0)
    tile = number % (group * tiles)
    if of < sets:
        b, h = of // (heads // group), of % (heads // group) * group + tile // tiles
        mbarrier.expect(q_full.index(CONSUMER), q_desc.block_type.nbytes)
        tma_load(
            q_desc, [b, h, (tiles - 1 - tile % tiles) * BLOCK_M, 0], q_full.index(CONSUMER), qs.index(CONSUMER)
        )  # fmt: skip


@gluon.jit
def _release(first, end, memory, STAGES: gl.constexpr):
    """Give K and V of tiles [first, end) free, which this consumer does not need."""
    _ks, _vs, k_full, k_empty, v_full, v_empty = memory
    for i in range(first, end):
        stage, phase = stage_of(i, STAGES)
        mbarrier.wait(k_full.index(stage), phase)  # else this might count as having read what was there before
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage), count=1)


@gluon.jit
def _consume(
    q_desc, o_desc, O, STATS, stride_o, queries, memory, work, F, right, MOD: gl.constexpr, LINEAR: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """O and STATS of every CONSUMERS-th tile of queries. The last of a head, which see most under a causal mask, come first."""
    qs, os, q_full = queries
    scale, _batch, heads, group, n_q, _n_k, tiles, sets, align = work
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    C: gl.constexpr = Static(LINEAR=LINEAR, MASK_VEC=0)
    of_set = group * tiles
    count, own, number = 0, 0, CONSUMER  # tiles of keys of earlier sets; of queries that were this consumer's; of its next one
    _fetch_queries(number, q_desc, queries, work, BLOCK_M, CONSUMER)
    for set in range(gl.cdiv(sets - gl.program_id(0), gl.num_programs(0))):
        seq, h_k, needed = _keys(set, F, work, right, BLOCK_N)
        end = count + gl.cdiv(needed, BLOCK_N)
        shift = align * (seq.n_k - n_q)
        if number >= (set + 1) * of_set:
            _release(count, end, memory, STAGES)
        for place in range(number - set * of_set, of_set, CONSUMERS):
            h, start_m = h_k * group + place // tiles, (tiles - 1 - place % tiles) * BLOCK_M
            last = place + CONSUMERS >= of_set
            scorer = score.prepare(F, seq, h, score.scale_of(F, scale), shift, C)
            keys = band.key_range(start_m, gl.minimum(start_m + BLOCK_M, n_q), seq.n_k, shift, None, right, F, BLOCK_N)
            n_tiles = gl.cdiv(gl.maximum(keys[3], 0), BLOCK_N)
            acc = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, accumulator(BLOCK_D))
            m_i, l_i = softmax.start(gl.zeros([BLOCK_M], gl.float32, ROWS), F.sinks, h, seq.real)
            mbarrier.wait(q_full.index(CONSUMER), own & 1)
            if n_tiles > 0:
                acc, m_i, l_i = attend(
                    qs.index(CONSUMER).reshape([BLOCK_M, BLOCK_D]), memory, acc, m_i, l_i, count, n_tiles, last,
                    seq.b * heads + h,
                    start_m, 0, keys, F, scorer, None, right, MOD, LINEAR, 0,
                    BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMER, False)  # fmt: skip
            meet()  # all warps of this consumer have read Q
            number += CONSUMERS
            own += 1
            _fetch_queries(number, q_desc, queries, work, BLOCK_M, CONSUMER)
            if last:
                _release(count + n_tiles, end, memory, STAGES)
            finish(
                acc, m_i, l_i, o_desc, O, STATS, stride_o, os.index(CONSUMER), seq, h, heads, start_m, n_q, F,
                HEAD_DIM, BLOCK_M, BLOCK_D)  # fmt: skip
        count = end
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_fwd_short(
    q_desc, k_desc, v_desc, o_desc, O, STATS, F, stride_o, batch, heads, group, n_q, n_k, tiles, sets, scale, align, right,
    MOD: gl.constexpr, LINEAR: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, which share `sets` = batch * heads / group; tiles = ceil(n_q / BLOCK_M).

    Arguments as flash_fwd's; not for masks, biases, packed sequences, and keys hidden on the left. n_k <= STAGES * BLOCK_N.
    """
    gl.static_assert(CONSUMERS == 3, "there are three below")
    qs = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    os = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, BLOCK_D], o_desc.layout)
    ks = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    q_full, k_full, v_full = barriers(CONSUMERS, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    k_empty, v_empty, v_cut = barriers(STAGES, CONSUMERS), barriers(STAGES, CONSUMERS), barriers(1, 1).index(0)
    fence_async_shared()  # for the barriers
    queries = (qs, os, q_full)
    memory = (ks, vs, k_full, k_empty, v_full, v_empty)
    work = (scale, batch, heads, group, n_q, n_k, tiles, sets, align)
    gl.warp_specialize([
        (_produce, (k_desc, v_desc, memory, v_cut, work, F, right, BLOCK_N, BLOCK_D, STAGES)),
        (_consume, (q_desc, o_desc, O, STATS, stride_o, queries, memory, work, F, right, MOD, LINEAR,
                    HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, 0)),
        (_consume, (q_desc, o_desc, O, STATS, stride_o, queries, memory, work, F, right, MOD, LINEAR,
                    HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, 1)),
        (_consume, (q_desc, o_desc, O, STATS, stride_o, queries, memory, work, F, right, MOD, LINEAR,
                    HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, 2)),
    ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip
