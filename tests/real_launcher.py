"""Run by test_real_launcher.py in a process of its own, without Triton's interpreter: each problem of PROBLEMS that the first
argument selects is run on a GPU that is not there (bench/stub_gpu.py), each of its launches three times by our own path and
then by Triton's JIT, and what reached CUDA's driver is printed as JSON."""

import json
import os
import struct
import sys
import weakref

# -I, which keeps the checkout's folders from shadowing packages, also drops this, by which another Triton may come.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

import torch  # noqa: E402
import triton  # noqa: E402

from tfkern import backends, call, launch, tma  # noqa: E402
from tfkern.bench import stub_gpu  # noqa: E402


def dense(batch, heads, n_q, dim, kv_heads=None, n_k=None, dtype=torch.bfloat16):
    shapes = (heads, n_q), *((kv_heads or heads, n_k or n_q),) * 2
    return [torch.empty(batch, h, n, dim, dtype=dtype) for h, n in shapes]


def together(batch, heads, n, dim):
    """Views of one packed projection: strides differ from those of a dense tensor."""
    return torch.empty(batch, n, 3, heads, dim, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)


def shifted(*shape):
    """At an address that is no multiple of 16 bytes, rows not dense."""
    return [x[..., 1:-1] for x in dense(*shape)]


PROBLEMS = {
    "portable-plain": lambda: ("portable", together(2, 3, 40, 64), {}),
    "portable-one-pass": lambda: ("portable", dense(32, 4, 100, 64), dict(is_causal=True)),
    "portable-features": lambda: ("portable", dense(2, 4, 40, 64, 2, 70), dict(
        attn_mask=torch.zeros(2, 1, 40, 70), is_causal=True, alibi_slopes=torch.zeros(4), sinks=torch.zeros(4), dropout_p=0.3,
        key_lengths=torch.tensor([70, 3]), softcap=3.0, window=(30, 7), causal_alignment="lower_right",
    )),
    "portable-unaligned": lambda: ("portable", shifted(2, 3, 40, 42), dict(attn_mask=torch.ones(40, 40) > 0)),
    "portable-varlen": lambda: ("portable", [x[0].transpose(0, 1) for x in dense(1, 3, 50, 64)], dict(
        cu_seqlens_q=torch.tensor([0, 20, 50]), cu_seqlens_k=torch.tensor([0, 30, 50]), scale=torch.ones(()),
    )),
    "hopper-plain": lambda: ("hopper", together(2, 3, 300, 64), {}),
    "hopper-short": lambda: ("hopper", dense(64, 12, 197, 64), {}),
    "hopper-one-query": lambda: ("hopper", dense(1, 3, 1, 128, 3, 40), dict(is_causal=True, causal_alignment="lower_right")),
    "hopper-features": lambda: ("hopper", dense(2, 4, 140, 40, 2, 270), dict(
        is_causal=True, alibi_slopes=torch.zeros(4), sinks=torch.zeros(4), window=(90, 7), key_lengths=torch.tensor([270, 3]),
    )),
    "hopper-varlen": lambda: ("hopper", [x[0].transpose(0, 1) for x in dense(1, 3, 300, 64)], dict(
        cu_seqlens_q=torch.tensor([0, 120, 300]), cu_seqlens_k=torch.tensor([0, 30, 300]), dropout_p=0.1,
    )),
}  # fmt: skip

stub = stub_gpu.Stub()
stub.listen()
launch.multiprocessors = lambda device: 132
rows, lent, jit_calls, descriptors = [], [], [], []
ours, by_jit, descriptor = launch.Launch.__call__, launch.Launch.by_jit, tma.descriptor
launch.Launch.by_jit = lambda *args, **tensors: (jit_calls.append(1), by_jit(*args, **tensors))[1]
tma.descriptor = lambda *args: (descriptors.append(1), descriptor(*args))[1]


def heard(action) -> tuple:
    """(what the driver was given, the tensor maps that were encoded, what the action returned)"""
    stub.launches.clear(), stub.encodings.clear(), jit_calls.clear(), descriptors.clear()
    result = action()
    return list(stub.launches), list(stub.encodings), result


def flat(argument) -> list[bytes]:
    """An argument as kernels get it; what is None has been compiled away."""
    if isinstance(argument, tuple):
        return [x for part in argument for x in flat(part)]
    if argument is None:
        return []
    if isinstance(argument, torch.Tensor):
        return [struct.pack("Q", argument.data_ptr())]
    return [struct.pack("f" if isinstance(argument, float) else "i", argument)]


def described(x: torch.Tensor, encoding: stub_gpu.Encoding) -> list[bytes]:
    """A tensor as kernels get it by TMA."""
    steps = [s if n > 1 else 8 for s, n in zip(x.stride(), x.shape, strict=True)]
    return [encoding.map, *(struct.pack("i", n) for n in x.shape), *(struct.pack("q", s) for s in (*steps[:3], 1))]


def compared(self, features=(), feature_tensors=(), **given) -> None:
    lent.extend(weakref.ref(x) for x in (*given.values(), *feature_tensors) if x is not None)
    for _ in range(2):  # the first call of a kernel is the JIT's; of tensors that lie so, it encodes
        ours(self, features, feature_tensors, **given)
    raw, _, _ = heard(lambda: ours(self, features, feature_tensors, **given))
    again = dict(jitted=len(jit_calls), descriptors=len(descriptors), encodings=len(stub.encodings))
    jit, encodings, kernel = heard(lambda: self.by_jit(features, **given))
    count, tensors = len(self.blocks), self.ordered(given)
    expected = [part for x, e in zip(tensors[:count], encodings, strict=True) for part in described(x, e)]
    expected += flat((tensors[count:], features, self.numbers)) + [bytes(8)] * 2  # two scratch pads, of no size
    rows.append(dict(
        kernel=self.kernel.__name__, again=again, launches=[len(raw), len(jit)],
        same={key: getattr(raw[0], key) == getattr(jit[0], key) for key in stub_gpu.Launched._fields},
        expected=raw[0].parameters == tuple(expected),
        grid=[raw[0].grid, (self.grid, 1, 1)], block=[raw[0].block, (32 * kernel.metadata.num_warps, 1, 1)],
        shared=[raw[0].shared, kernel.metadata.shared], attributes=raw[0].attributes,
        maps=[dict(
            base=e.base == x.data_ptr(), sizes=e.sizes == tuple(x.shape)[::-1], box=e.box, steps=e.steps, strides=e.strides,
            true_strides=all(n == 1 or s == 2 * t for s, t, n in zip(e.strides, x.stride()[2::-1], x.shape[2::-1], strict=True)),
            wanted_box=[dim, rows, 1, 1],
        ) for x, e, (rows, dim, *_) in zip(tensors[:count], encodings, self.blocks, strict=True)],
    ))  # fmt: skip


def run(name: str) -> None:
    backend, qkv, options = PROBLEMS[name]()
    problem, t = call.build(*qkv, enable_gqa=True, **options)
    t = t._replace(seed=torch.zeros(2, dtype=torch.int64) if problem.dropout_p else None)
    out, stats = backends.BACKENDS[backend].forward(problem, t)
    if name == "hopper-plain":  # keys at the same address, but by other strides, and fewer of them: other tensor maps
        dense_strides = torch.empty(t.k.shape, device="meta").stride()
        backends.BACKENDS[backend].forward(problem, t._replace(k=t.k.as_strided(t.k.shape, dense_strides)))
        backends.BACKENDS[backend].forward(*call.build(t.q, t.k[:, :, :200], t.v[:, :, :200]))
    needed = [x is not None for x in t[:6]]
    backends.BACKENDS[backend].backward(problem, t, out, stats, torch.empty_like(out), torch.empty_like(stats[:, :, 1]), needed)


launch.Launch.__call__ = compared
found = {}
for name in sys.argv[1].split(","):
    rows.clear(), lent.clear()
    run(name)
    found[name] = dict(launches=list(rows), alive=sum(x() is not None for x in lent))
print(json.dumps(dict(triton=triton.__version__, problems=found)))
