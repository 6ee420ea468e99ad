"""What Gluon kernels for Hopper share: TMA under its names of all Triton versions, named barriers, layouts."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .. import dropout, tile

# Triton 3.8 renamed them; 3.9 has the new names only.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a partition's warps; renamed in Triton 3.7
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_Memory = gl.shared_memory_descriptor
reinterpret = _Memory.reinterpret if hasattr(_Memory, "reinterpret") else _Memory._reinterpret  # the first from 3.9 on

TURN = gl.constexpr(8)  # the first named barrier that Triton leaves to kernels, and the next, are for taking turns
PAIR = gl.constexpr(256)  # threads of two consumers


@gluon.constexpr_function
def barrier_assembly(kind, index, threads):
    """bar.sync waits until `threads` threads have come to barrier `index`; bar.arrive comes and goes on."""
    return f"{{ bar.{kind} {index}, {threads}; mov.b32 $0, $1; }}"


@gluon.jit
def named_barrier(KIND: gl.constexpr, INDEX: gl.constexpr, THREADS: gl.constexpr):
    ASSEMBLY: gl.constexpr = barrier_assembly(KIND, INDEX, THREADS)
    gl.inline_asm_elementwise(ASSEMBLY, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def take_turn(CONSUMER: gl.constexpr, PINGPONG: gl.constexpr):
    """Wait until the other consumer has issued its products."""
    if PINGPONG:
        named_barrier("sync", TURN + CONSUMER, PAIR)


@gluon.jit
def give_turn(CONSUMER: gl.constexpr, PINGPONG: gl.constexpr):
    """Let the other consumer issue its products, while this one computes its softmax."""
    if PINGPONG:
        named_barrier("arrive", TURN + 1 - CONSUMER, PAIR)


@gluon.constexpr_function
def accumulator(columns):
    """Layout of a product [64, columns] of a warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def begin_turns(CONSUMER: gl.constexpr, PINGPONG: gl.constexpr):
    """Consumer 0 multiplies first."""
    if PINGPONG and CONSUMER == 1:
        named_barrier("arrive", TURN, PAIR)


@gluon.jit
def end_turns(CONSUMER: gl.constexpr, PINGPONG: gl.constexpr):
    """Take up the arrival that is left over of begin_turns."""
    if PINGPONG and CONSUMER == 0:
        named_barrier("sync", TURN, PAIR)


@gluon.jit
def stage_of(i, STAGES: gl.constexpr):
    """(buffer, phase of its barriers) of tile number i."""
    return i % STAGES, (i // STAGES) & 1


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT mbarriers, each of which completes a phase when ARRIVALS have come."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.constexpr_function
def operand(columns):
    """Layout of a left operand in registers, of a product with as many columns."""
    return gl.DotOperandLayout(operand_index=0, parent=accumulator(columns), k_width=2)


@gluon.jit
def buffers(desc, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of a descriptor, each [1, 1, rows, BLOCK_D]."""
    return gl.allocate_shared_memory(desc.dtype, [COUNT, 1, 1, desc.block_shape[2], desc.block_shape[3]], desc.layout)


@gluon.jit
def numbers(COUNT: gl.constexpr, ROWS: gl.constexpr):
    """Shared memory for COUNT times one float32 a row."""
    return gl.allocate_shared_memory(gl.float32, [COUNT, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def full_tiles(bounds, first, n_tiles, BLOCK: gl.constexpr):
    """(begin, end): of the n_tiles tiles from `first` on, those of [begin, end) are whole and not cut by the band's edges.
    bounds: as of band.key_range."""
    _lo, full_lo, full_hi, _hi = bounds
    begin = gl.minimum((full_lo - first) // BLOCK, n_tiles)
    return begin, gl.minimum(gl.maximum((full_hi - first) // BLOCK, begin), n_tiles)


@gluon.jit
def store_rows(x, X, stride, at, h, row, n, HEAD_DIM: gl.constexpr):
    """The first n rows of x [ROWS, BLOCK_D], and of those HEAD_DIM columns, to X from a row on, where TMA would write the rows
    behind them too: packed sequences end inside of a tensor."""
    BLOCK_D: gl.constexpr = x.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (BLOCK_D // 8), BLOCK_D // 8], [4, 1], [1, 0])
    x = gl.convert_layout(x, LAYOUT)
    rows = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    X = tile.head(X, stride, at, h, row, 8)
    offsets = rows[:, None] * tile.stride_of(stride, 2, 8).to(gl.int32) + columns[None, :]
    gl.store(X + offsets, x, mask=(rows < n)[:, None] & (columns < HEAD_DIM)[None, :])


@gluon.jit
def hide_rows(x, seen):
    """Zero the rows of a tile [N, BLOCK_D] in shared memory where seen [N] is 0."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    there = gl.convert_layout(seen, gl.SliceLayout(1, LAYOUT)) > 0
    x.store(gl.where(there[:, None], x.load(LAYOUT), 0.0))


@gluon.jit
def survivors(drop, bh, start_m, start_n, like):
    """True where dropout keeps the probability of queries from start_m and keys from start_n on, shaped as `like`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    rows = start_m + gl.arange(0, like.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    groups = start_n // 8 + gl.arange(0, like.shape[1] // 8, layout=gl.SliceLayout(0, LAYOUT))
    return gl.convert_layout(dropout.keep_at(drop, bh, rows[:, None], groups[None, :]), like.type.layout)


@gluon.jit
def survivors_transposed(drop, bh, start_m, start_n, like):
    """The same, of keys by queries."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, 4], [0, 1])
    rows = start_m + gl.arange(0, like.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    groups = start_n // 8 + gl.arange(0, like.shape[0] // 8, layout=gl.SliceLayout(1, LAYOUT))
    return gl.convert_layout(dropout.keep_transposed_at(drop, bh, rows[None, :], groups[:, None]), like.type.layout)
