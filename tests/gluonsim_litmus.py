"""Small kernels, each right unless a constexpr argument breaks one synchronisation."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tfkern.kernels.hopper.parts import named_barrier, reinterpret, tma_load, tma_store


@gluon.jit
def copy(
    source,
    target,
    corner,
    WAIT: gl.constexpr,
    FENCE: gl.constexpr,
    STORE_WAIT: gl.constexpr,
    INIT: gl.constexpr,
    EXPECTED: gl.constexpr,
):
    """target = source + 1, through shared memory."""
    block = gl.allocate_shared_memory(source.dtype, source.block_shape, source.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if INIT:
        mbarrier.init(full, count=1)
    mbarrier.expect(full, EXPECTED)
    tma_load(source, [corner, 0], full, block)
    if WAIT:
        mbarrier.wait(full, 0)
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    block.store(block.load(layout) + 1)
    if FENCE:
        fence_async_shared()
    tma_store(target, [corner, 0], block)
    if STORE_WAIT:
        tma.store_wait(0)


@gluon.jit
def product(a, b, c_ptr, WAIT: gl.constexpr, OUTSTANDING: gl.constexpr, IS_ASYNC: gl.constexpr):
    """c = a b + a b, in two chained wgmmas."""
    M: gl.constexpr = a.block_shape[0]
    N: gl.constexpr = b.block_shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    a_block = gl.allocate_shared_memory(a.dtype, a.block_shape, a.layout)
    b_block = gl.allocate_shared_memory(b.dtype, b.block_shape, b.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.expect(full, a.block_type.nbytes + b.block_type.nbytes)
    tma_load(a, [0, 0], full, a_block)
    tma_load(b, [0, 0], full, b_block)
    mbarrier.wait(full, 0)
    acc = gl.zeros([M, N], gl.float32, layout)
    acc = warpgroup_mma(a_block, b_block, acc, is_async=IS_ASYNC)
    acc = warpgroup_mma(a_block, b_block, acc, is_async=IS_ASYNC)
    if WAIT:
        acc = warpgroup_mma_wait(OUTSTANDING, deps=(acc,))
    rows = gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    gl.store(c_ptr + rows[:, None] * N + columns[None, :], acc)


@gluon.jit
def _write(block, INDEX: gl.constexpr, THREADS: gl.constexpr, ARRIVALS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    block.store(gl.full([128], 7, gl.int32, layout))
    for _ in gl.static_range(ARRIVALS):
        named_barrier("arrive", INDEX, THREADS)


@gluon.jit
def _read(block, target_ptr, INDEX: gl.constexpr, THREADS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    named_barrier("sync", INDEX, THREADS)
    gl.store(target_ptr + gl.arange(0, 128, layout), block.load(layout))


@gluon.jit
def hand_over(target_ptr, INDEX: gl.constexpr, THREADS: gl.constexpr, ARRIVALS: gl.constexpr):
    """One partition writes a block and signals on a named barrier, another waits and reads it."""
    block = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.warp_specialize([(_write, (block, INDEX, THREADS, ARRIVALS)), (_read, (block, target_ptr, INDEX, THREADS))], [4], [120])


@gluon.jit
def _consume(block, full, empty, target_ptr, steps, FIRST_PHASE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offsets = gl.arange(0, 128, layout)
    phase = FIRST_PHASE
    for step in range(steps):
        mbarrier.wait(full, phase)
        gl.store(target_ptr + step * 128 + offsets, block.load(layout))
        mbarrier.arrive(empty, count=1)
        phase ^= 1


@gluon.jit
def _produce(block, full, empty, steps, ARRIVALS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    phase = 1
    for step in range(steps):
        mbarrier.wait(empty, phase)
        block.store(step + gl.arange(0, 128, layout))
        for _ in gl.static_range(ARRIVALS):
            mbarrier.arrive(full, count=1)
        phase ^= 1


@gluon.jit
def stream(target_ptr, steps, FIRST_PHASE: gl.constexpr, ARRIVALS: gl.constexpr):
    """A producer and a consumer that share one block."""
    block = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize(
        [
            (_produce, (block, full, empty, steps, ARRIVALS)),
            (_consume, (block, full, empty, target_ptr, steps, FIRST_PHASE)),
        ],
        [4],
        [120],
    )


@gluon.jit
def fill(target_ptr, size, BLOCK: gl.constexpr, MASKED: gl.constexpr, OVERLAP: gl.constexpr):
    """target = program number, one block per program."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offsets = gl.program_id(0) * (BLOCK - OVERLAP) + gl.arange(0, BLOCK, layout)
    mask = offsets < size if MASKED else None
    gl.store(target_ptr + offsets, gl.full([BLOCK], 0, gl.float32, layout) + gl.program_id(0), mask=mask)


@gluon.jit
def arithmetic(target_ptr, large, half_ptr):
    """Stores what scalar arithmetic in Triton's types gives."""
    half = gl.load(half_ptr)
    gl.store(target_ptr + 0, (large + large).to(gl.float64))
    gl.store(target_ptr + 1, (large.to(gl.int64) + large).to(gl.float64))
    gl.store(target_ptr + 2, (half * 3).to(gl.float64))
    gl.store(target_ptr + 3, (half * (half.to(gl.float32) * 3)).to(gl.float64))
    gl.store(target_ptr + 4, (half / 3).to(gl.float64))
    gl.store(target_ptr + 5, (-large // 2).to(gl.float64))


@gluon.jit
def scaled_relu(source_ptr, target_ptr, total_ptr, SIZE: gl.constexpr, BLOCK: gl.constexpr):
    """target = max(3 source - 1, 0) on all but the last element, its sum added to total, by descriptors made on the device."""
    gl.static_assert(SIZE % 16 == 0)
    blocks: gl.constexpr = gl.cdiv(SIZE, BLOCK)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK], gl.float32)
    staging = gl.allocate_shared_memory(gl.float32, [2, BLOCK], shared)
    target = tma.make_tensor_descriptor(target_ptr, [1, SIZE], [SIZE, 1], [1, BLOCK], shared)
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        offsets = block * BLOCK + gl.arange(0, BLOCK, layout)
        x = gl.load(source_ptr + offsets, mask=offsets < SIZE - 1, other=0)
        x = gl.fma(x, 3.0, -1.0)
        x = gl.where(x > 0, x, 0.0)
        gl.atomic_add(total_ptr, gl.sum(x, 0))
        half = staging.slice(block % 2, 1)
        tma.store_wait(0)
        half.store(x[None, :])
        fence_async_shared()
        tma_store(target, [0, block * BLOCK], half)
    tma.store_wait(0)


@gluon.jit
def two_types(source, target, FENCE: gl.constexpr, STORE_WAIT: gl.constexpr, SECOND: gl.constexpr):
    """target = source + 1, of 16-bit numbers, in memory that then holds others, and SECOND: is read as the first again."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    slot = gl.allocate_shared_memory(gl.float32, [16, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    block = reinterpret(slot, source.dtype, source.block_shape, source.layout)
    mbarrier.expect(full, source.block_type.nbytes)
    tma_load(source, [0, 0], full, block)
    mbarrier.wait(full, 0)
    value = block.load(layout) + 1
    slot.store(gl.zeros([16, 32], gl.float32, layout))
    if SECOND:
        value = block.load(layout)
    block.store(value)
    if FENCE:
        fence_async_shared()
    tma_store(target, [0, 0], block)
    if STORE_WAIT:
        tma.store_wait(0)
    slot.store(gl.zeros([16, 32], gl.float32, layout))
    tma.store_wait(0)
