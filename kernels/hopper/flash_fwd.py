"""Forward for Hopper: a producer fetches tiles by TMA, each of one or two consumer warpgroups owns BLOCK_M = 64 queries.

A consumer issues S_j = Q K_j^T and O += P_{j-1} V_{j-1} together and computes the softmax of S_j under the second product; two
consumers can take turns (PINGPONG), so that one multiplies while the other exponentiates (Shah et al., FlashAttention-3, 2024).
Which keys a query sees is as in kernels/band.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

from .. import band, score, sequence, softmax
from .parts import (
    accumulator,
    barriers,
    begin_turns,
    end_turns,
    give_turn,
    stage_of,
    take_turn,
    tma_load,
    tma_store,
    zero_rows,
)  # fmt: skip

# Changing these numbers never recompiles.
RUN_TIME = ["heads", "group", "n_q", "n_k", "tiles", "align", "LEFT", "RIGHT"]


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, memory, v_cut, b, h, h_kv, start_m, lo, hi, n_k,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Fetch Q once, then K and V of every tile of [lo, hi) as their buffers fall free. Rows beyond a tensor arrive as zeros;
    keys of the last tile that are there, but that no query here sees, are zeroed in V."""
    qs, ks, vs, q_full, k_full, k_empty, v_full, v_empty = memory
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
        tma_load(q_desc, [b, h, start_m + c * BLOCK_M, 0], q_full.index(c), qs.index(c))
    for i in range(gl.cdiv(hi - lo, BLOCK_N)):
        stage, phase = stage_of(i, STAGES)
        start_n = lo + i * BLOCK_N
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma_load(k_desc, [b, h_kv, start_n, 0], k_full.index(stage), ks.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        if gl.minimum(start_n + BLOCK_N, n_k) > hi:
            mbarrier.expect(v_cut, v_desc.block_type.nbytes)
            tma_load(v_desc, [b, h_kv, start_n, 0], v_cut, vs.index(stage))
            mbarrier.wait(v_cut, 0)
            zero_rows(vs.index(stage).reshape([BLOCK_N, D]), hi - start_n, BLOCK_N)
            fence_async_shared()
            mbarrier.arrive(v_full.index(stage), count=1)
        else:
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [b, h_kv, start_n, 0], v_full.index(stage), vs.index(stage))


@gluon.jit
def _softmax(s, m_i, l_i, start_m, start_n, S, LEFT, RIGHT, MASKED: gl.constexpr):
    """Take in scores s [BLOCK_M, BLOCK_N] as softmax.step does."""
    S_LAYOUT: gl.constexpr = s.type.layout
    if MASKED:
        offs_m = start_m + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, S_LAYOUT))
        offs_n = start_n + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(band.visible(offs_m[:, None], offs_n[None, :], S.n_k, S.shift, LEFT, RIGHT), s, float("-inf"))
    return softmax.step(s, m_i, l_i, S, True)


@gluon.jit
def _step(
    i, q, memory, acc, p, m_i, l_i, start_m, lo, n_tiles, S, LEFT, RIGHT, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr, PINGPONG: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """The scores and softmax of tile i, and the product of the tile before it, whose P is p."""
    _, ks, vs, _, k_full, k_empty, v_full, v_empty = memory
    stage, _ = stage_of(i, STAGES)
    before, phase = stage_of(i - 1, STAGES)
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    take_turn(CONSUMER, PINGPONG)
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    k = ks.index(stage).reshape([BLOCK_N, D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, D] @ [D, BLOCK_N]
    mbarrier.wait(v_full.index(before), phase)
    v = vs.index(before).reshape([BLOCK_N, D])
    acc = warpgroup_mma(p, v, acc, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, D]
    give_turn(CONSUMER, PINGPONG)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    x, alpha, m_i, l_i = _softmax(s, m_i, l_i, start_m, lo + i * BLOCK_N, S, LEFT, RIGHT, MASKED)
    following = gl.convert_layout(x.to(v.dtype), p.type.layout)
    # A real branch: without one ptxas moves the wait below above the exponentials, and nothing overlaps.
    stage, phase = stage_of(i + 1, STAGES)
    mbarrier.wait(k_full.index(stage), phase, pred=i + 1 < n_tiles)
    acc, following = warpgroup_mma_wait(0, deps=(acc, following))
    mbarrier.arrive(v_empty.index(before), count=1)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    return acc * alpha[:, None], following, m_i, l_i


@gluon.jit
def _consume(
    o_desc, LSE, memory, b, h, start_m, lo, full_lo, full_hi, hi, S, row, n_q, LEFT, RIGHT, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """All of 64 queries: O and LSE."""
    qs, ks, vs, q_full, k_full, k_empty, v_full, _v_empty = memory
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    O_LAYOUT: gl.constexpr = accumulator(D)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    start_m += CONSUMER * BLOCK_M
    n_tiles = gl.cdiv(gl.maximum(hi - lo, 0), BLOCK_N)
    q = qs.index(CONSUMER).reshape([BLOCK_M, D])
    acc = gl.zeros([BLOCK_M, D], gl.float32, O_LAYOUT)
    m_i = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)
    l_i = gl.zeros([BLOCK_M], gl.float32, ROWS)
    mbarrier.wait(q_full.index(CONSUMER), 0)
    if n_tiles > 0:
        begin_turns(CONSUMER, PINGPONG)
        mbarrier.wait(k_full.index(0), 0)
        take_turn(CONSUMER, PINGPONG)
        zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
        k = ks.index(0).reshape([BLOCK_N, D])
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)  # [BLOCK_M, D] @ [D, BLOCK_N]
        give_turn(CONSUMER, PINGPONG)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(0), count=1)
        x, _, m_i, l_i = _softmax(s, m_i, l_i, start_m, lo, S, LEFT, RIGHT, True)
        p = gl.convert_layout(x.to(vs.dtype), P_LAYOUT)
        stage, phase = stage_of(1, STAGES)
        mbarrier.wait(k_full.index(stage), phase, pred=n_tiles > 1)
        left = gl.minimum((full_lo - lo) // BLOCK_N, n_tiles)
        right = gl.minimum(gl.maximum((full_hi - lo) // BLOCK_N, left), n_tiles)
        if LEFT is not None:
            for i in range(1, left):
                acc, p, m_i, l_i = _step(
                    i, q, memory, acc, p, m_i, l_i, start_m, lo, n_tiles, S, LEFT, RIGHT,
                    BLOCK_M, BLOCK_N, D, STAGES, CONSUMER, PINGPONG, True)  # fmt: skip
        for i in range(gl.maximum(left, 1), right):
            acc, p, m_i, l_i = _step(
                i, q, memory, acc, p, m_i, l_i, start_m, lo, n_tiles, S, LEFT, RIGHT,
                BLOCK_M, BLOCK_N, D, STAGES, CONSUMER, PINGPONG, False)  # fmt: skip
        for i in range(gl.maximum(right, 1), n_tiles):
            acc, p, m_i, l_i = _step(
                i, q, memory, acc, p, m_i, l_i, start_m, lo, n_tiles, S, LEFT, RIGHT,
                BLOCK_M, BLOCK_N, D, STAGES, CONSUMER, PINGPONG, True)  # fmt: skip
        stage, phase = stage_of(n_tiles - 1, STAGES)
        mbarrier.wait(v_full.index(stage), phase)
        v = vs.index(stage).reshape([BLOCK_N, D])
        acc = warpgroup_mma(p, v, acc, is_async=True)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, D]
        acc = warpgroup_mma_wait(0, deps=(acc,))
        end_turns(CONSUMER, PINGPONG)
    l_safe = gl.where(l_i == 0.0, 1.0, l_i)
    inverse = gl.convert_layout(1.0 / l_safe, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)
    q.store((acc * inverse[:, None]).to(q.dtype))  # O leaves through the memory of Q
    fence_async_shared()
    tma_store(o_desc, [b, h, start_m, 0], qs.index(CONSUMER))
    offs_m = start_m + gl.arange(0, BLOCK_M, layout=ROWS)
    gl.store(LSE + row + offs_m, (m_i * S.c + gl.log2(l_safe)) * softmax.LN2, mask=offs_m < n_q)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def flash_fwd(
    q_desc, k_desc, v_desc, o_desc, LSE, F, heads, group, n_q, n_k, tiles, scale, align, LEFT, RIGHT,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    PINGPONG: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (batch * heads * tiles,), tiles = ceil(n_q / (CONSUMERS * BLOCK_M)), the last queries first: with a causal mask
    they have most to do.

    Descriptors of Q and O (B, heads, n_q, D) in blocks of (1, 1, BLOCK_M, D), of K and V (B, heads / group, n_k, D) in blocks
    of (1, 1, BLOCK_N, D); D here may exceed theirs. LSE (B, heads, n_q) fp32 contiguous, F Features: only key_lengths yet.
    scale > 0; n_q, n_k > 0. For 4 warps: they are the producer.
    """
    gl.static_assert(STAGES >= 2, "K of the next tile is waited for before V of this one is free")
    gl.static_assert(CONSUMERS == 2 or (CONSUMERS == 1 and not PINGPONG), "one consumer, or two, which can take turns")
    seq, h, start_m = sequence.locate_queries(F, gl.program_id(0), tiles, heads, 0, n_q, n_k, BLOCK_M * CONSUMERS)
    b, shift = seq.b, align * (seq.n_k - n_q)
    S = score.prepare(F, seq, h, scale, shift, True, 0)
    end_m = gl.minimum(start_m + BLOCK_M * CONSUMERS, n_q)
    lo, full_lo, full_hi, hi = band.key_range(start_m, end_m, seq.n_k, shift, LEFT, RIGHT, F, BLOCK_N)
    qs = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, BLOCK_M, D], q_desc.layout)
    ks = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_full, k_full, v_full = barriers(CONSUMERS, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    k_empty, v_empty = barriers(STAGES, CONSUMERS), barriers(STAGES, CONSUMERS)
    v_cut = barriers(1, 1).index(0)
    fence_async_shared()  # for the barriers
    row = (b * heads + h).to(gl.int64) * n_q
    memory = (qs, ks, vs, q_full, k_full, k_empty, v_full, v_empty)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, memory, v_cut, b, h, h // group, start_m, lo, hi, n_k,
                        BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS)),
            (_consume, (o_desc, LSE, memory, b, h, start_m, lo, full_lo, full_hi, hi, S, row, n_q,
                        LEFT, RIGHT, BLOCK_M, BLOCK_N, D, STAGES, 0, PINGPONG)),
        ], [4], [REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_produce, (q_desc, k_desc, v_desc, memory, v_cut, b, h, h // group, start_m, lo, hi, n_k,
                        BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS)),
            (_consume, (o_desc, LSE, memory, b, h, start_m, lo, full_lo, full_hi, hi, S, row, n_q,
                        LEFT, RIGHT, BLOCK_M, BLOCK_N, D, STAGES, 0, PINGPONG)),
            (_consume, (o_desc, LSE, memory, b, h, start_m, lo, full_lo, full_hi, hi, S, row, n_q,
                        LEFT, RIGHT, BLOCK_M, BLOCK_N, D, STAGES, 1, PINGPONG)),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
