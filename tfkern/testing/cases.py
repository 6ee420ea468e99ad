"""Named problems, one a line. The name is the id of a problem in every test and table."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """A problem: q is (batch, heads, n_q, head_dim), k and v have kv_heads, n_k and v_head_dim where given; options are
    keyword arguments of tfkern.attention, key_lengths as a tuple.

    mask: "bool", "float" (float32) or "query" (the dtype of q), and the dims it has, those along which it broadcasts as 1:
    "bool bhqk", "float 1h1k". slopes: "h" or "bh". lengths: those of packed sequences, for queries and keys, of which batch,
    n_q and n_k follow. score_mod: a pair of kernels/score_mods.py by name. magnitude: a factor of q and k.
    """

    name: str
    heads: int
    n_q: int
    head_dim: int
    n_k: int | None = None
    kv_heads: int | None = None
    v_head_dim: int | None = None
    batch: int = 1
    layout: str = "bhnd"
    mask: str | None = None
    slopes: str | None = None
    sinks: bool = False
    score_mod: str | None = None
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    magnitude: float = 1.0
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def needs_triton(case: Case) -> bool:
    """Whether a case can't even be stated without Triton: a score_mod is a pair of jit functions."""
    return case.score_mod is not None


CAUSAL = dict(is_causal=True)
LOWER_RIGHT = dict(is_causal=True, causal_alignment="lower_right")

CASES = [
    Case("full", 2, 128, 64),
    Case("vit-197", 1, 197, 64, layout="packed"),
    Case("one-query", 2, 1, 32, n_k=77),
    Case("one-key", 2, 77, 32, n_k=1),
    Case("one-by-one", 1, 1, 1),
    Case("239x1", 1, 239, 40, n_k=1),
    Case("113x203", 1, 113, 64, n_k=203),
    Case("causal", 2, 129, 64, layout="packed", options=CAUSAL),
    Case("causal-wide", 1, 50, 32, n_k=110, options=CAUSAL),
    Case("causal-tall", 1, 110, 32, n_k=50, options=CAUSAL),
    Case("lower-right-wide", 1, 50, 32, n_k=110, options=LOWER_RIGHT),
    Case("lower-right-tall", 1, 110, 32, n_k=50, options=LOWER_RIGHT),
    Case("decode", 2, 1, 64, n_k=99, options=LOWER_RIGHT),
    Case("window", 1, 150, 32, options=dict(window=(20, 10))),
    Case("window-left", 1, 150, 32, options=dict(window=(33, None))),
    Case("window-right", 1, 150, 32, options=dict(window=(None, 7))),
    Case("window-zero", 1, 70, 16, options=dict(window=(0, 0))),
    Case("window-beyond", 1, 70, 16, options=dict(window=(10**12, 10**12))),
    Case("window-causal", 1, 150, 32, options=dict(window=(40, 99), **CAUSAL)),
    Case("window-dead-rows", 1, 150, 32, n_k=60, options=dict(window=(20, 10))),
    Case("window-lower-right", 1, 60, 32, n_k=150, options=dict(window=(20, 10), causal_alignment="lower_right")),
    Case("padded", 2, 90, 32, batch=4, options=dict(key_lengths=(90, 1, 0, 41))),
    Case("padded-causal", 1, 90, 32, batch=2, options=dict(key_lengths=(90, 37), **CAUSAL)),
    Case("padded-lower-right", 1, 40, 32, n_k=90, batch=3, options=dict(key_lengths=(90, 55, 20), **LOWER_RIGHT)),
    Case("padded-window", 1, 90, 32, batch=2, options=dict(key_lengths=(80, 33), window=(15, 20))),
    Case("gqa", 4, 70, 32, kv_heads=2),
    Case("mqa-causal", 3, 100, 32, kv_heads=1, options=CAUSAL),
    Case("gqa-everything", 4, 60, 24, kv_heads=2, n_k=140, v_head_dim=40, batch=2,
         options=dict(key_lengths=(140, 101), window=(50, 30), scale=0.3, **LOWER_RIGHT)),
    Case("d3", 1, 70, 3),
    Case("d59", 1, 70, 59, options=CAUSAL),
    Case("d80", 1, 70, 80),
    Case("d96-v-wider", 1, 70, 96, v_head_dim=111),
    Case("d128", 1, 70, 128, options=CAUSAL),
    Case("d160-v-narrow", 1, 70, 160, v_head_dim=8),
    Case("d256", 1, 70, 256),
    Case("scale-zero", 1, 70, 32, options=dict(scale=0.0, **CAUSAL)),
    Case("scale-negative", 1, 70, 32, options=dict(scale=-0.5, **CAUSAL)),
    Case("large-logits", 1, 70, 32, options=dict(scale=8.0)),
    Case("layout-bnhd", 2, 70, 32, batch=2, layout="bnhd", options=CAUSAL),
    Case("layout-strided", 2, 70, 32, batch=2, layout="strided", options=CAUSAL),
    Case("layout-expanded", 2, 70, 32, batch=2, layout="expanded"),
    Case("empty-batch", 2, 10, 16, batch=0),
    Case("empty-heads", 0, 10, 16),
    Case("empty-queries", 2, 0, 16, n_k=10),
    Case("empty-keys", 2, 10, 16, n_k=0, options=CAUSAL),
]  # fmt: skip

PACKED = ((37, 0, 1, 70), (37, 20, 9, 70))
SELF_PACKED = ((33, 0, 64, 1, 30),) * 2
DROPOUT = dict(dropout_p=0.3)

# Each feature alone, and with what it touches.
FEATURE_CASES = [
    Case("bool-mask", 2, 70, 32, batch=2, mask="bool bhqk"),
    Case("bool-mask-padding", 2, 70, 32, batch=3, mask="bool b11k"),
    Case("bool-mask-rows", 2, 50, 32, n_k=80, mask="bool 11q1"),
    Case("bool-mask-causal", 1, 90, 32, n_k=120, mask="bool 11qk", options=CAUSAL),
    Case("bias", 2, 70, 32, batch=2, mask="float bhqk"),
    Case("bias-aligned", 2, 80, 32, batch=1, n_k=64, mask="query 1hqk"),
    Case("bias-of-heads", 2, 70, 32, batch=2, mask="query 1hqk"),
    Case("bias-of-batches", 2, 70, 32, batch=2, mask="float b1qk"),
    Case("bias-shared", 2, 70, 32, batch=2, mask="float 11qk"),
    Case("bias-of-keys", 2, 70, 32, batch=2, mask="float b11k"),
    Case("bias-of-queries", 2, 70, 32, batch=2, mask="float 1hq1"),
    Case("bias-of-nothing", 2, 70, 32, batch=2, mask="float 1111"),
    Case("bias-2d", 2, 40, 16, n_k=90, mask="float qk"),
    Case("bias-causal", 2, 90, 32, n_k=60, mask="float 1hqk", options=LOWER_RIGHT),
    Case("bias-window", 1, 130, 32, mask="float 11qk", options=dict(window=(20, 9))),
    Case("bias-padded", 2, 70, 32, batch=3, mask="float b1qk", options=dict(key_lengths=(70, 0, 33))),
    Case("bias-gqa", 4, 70, 32, kv_heads=2, mask="float 1hqk"),
    Case("bias-one-query", 2, 1, 32, n_k=70, batch=2, mask="float bhqk"),
    Case("bias-one-key", 2, 70, 32, n_k=1, batch=2, mask="float bhqk"),
    Case("dropout", 2, 70, 32, batch=2, options=DROPOUT),
    Case("dropout-causal", 2, 90, 32, n_k=130, options=dict(**DROPOUT, **LOWER_RIGHT)),
    Case("dropout-window", 1, 130, 32, options=dict(window=(21, 10), **DROPOUT)),
    Case("dropout-all", 1, 40, 16, options=dict(dropout_p=1.0)),
    Case("dropout-bias", 2, 70, 32, batch=2, mask="float 1hqk", options=DROPOUT),
    Case("packed", 2, 0, 32, lengths=PACKED),
    Case("packed-self-causal", 2, 0, 32, lengths=SELF_PACKED, layout="packed", options=CAUSAL),
    Case("packed-lower-right", 2, 0, 32, lengths=PACKED, options=LOWER_RIGHT),
    Case("packed-window", 1, 0, 32, lengths=PACKED, options=dict(window=(9, 5))),
    Case("packed-gqa", 4, 0, 32, lengths=PACKED, kv_heads=2, v_head_dim=40),
    Case("packed-bias", 2, 0, 32, lengths=PACKED, mask="float bhqk"),
    Case("packed-bias-dropout", 2, 0, 32, lengths=PACKED, mask="query 1hqk", options=dict(**DROPOUT, **CAUSAL)),
    Case("packed-bias-of-keys", 2, 0, 32, lengths=PACKED, mask="float b11k"),
    Case("packed-bool-mask", 2, 0, 32, lengths=SELF_PACKED, mask="bool 1hqk"),
    Case("packed-slopes", 2, 0, 32, lengths=PACKED, slopes="bh", options=CAUSAL),
    Case("packed-sinks", 2, 0, 32, lengths=PACKED, sinks=True),
    Case("packed-one", 2, 0, 32, lengths=((50,), (70,))),
    Case("packed-none", 2, 0, 32, lengths=((), ())),
    Case("packed-all-empty", 2, 0, 32, lengths=((0, 0), (0, 0))),
    Case("softcap", 2, 70, 32, options=dict(softcap=2.0)),
    Case("softcap-wide", 1, 70, 32, options=dict(softcap=50.0, **CAUSAL)),
    Case("softcap-tight", 1, 70, 32, magnitude=3.0, options=dict(softcap=0.5)),
    Case("slopes", 2, 70, 32, batch=2, slopes="h", options=CAUSAL),
    Case("slopes-of-batches", 2, 70, 32, n_k=90, batch=2, slopes="bh"),
    Case("slopes-lower-right", 2, 40, 32, n_k=90, batch=2, slopes="h", options=dict(key_lengths=(90, 50), **LOWER_RIGHT)),
    Case("sinks", 2, 70, 32, batch=2, sinks=True),
    Case("sinks-dead-rows", 2, 70, 32, n_k=30, sinks=True, options=dict(window=(5, 5))),
    Case("score-mod", 2, 70, 32, score_mod="signed_log"),
    Case("score-mod-places", 2, 70, 32, batch=2, score_mod="cooling", options=CAUSAL),
    Case("scale-as-tensor", 2, 70, 32, options=dict(scale=(0.3,), **CAUSAL)),
    Case("scale-as-tensor-zero", 1, 70, 32, options=dict(scale=(0.0,))),
    Case("scale-as-tensor-negative", 1, 70, 32, options=dict(scale=(-0.4,), softcap=3.0)),
    Case("precise-delta", 2, 150, 32, options=dict(precise_delta=True, **CAUSAL)),
    Case("precise-delta-packed", 4, 0, 24, kv_heads=2, v_head_dim=17, lengths=PACKED, sinks=True,
         options=dict(precise_delta=True, dropout_p=0.2)),
    Case("large-fp16", 2, 70, 64, magnitude=30.0),
    Case("large-fp16-softcap", 1, 70, 64, magnitude=30.0, options=dict(softcap=30.0)),
    Case("everything", 4, 60, 24, kv_heads=2, n_k=100, v_head_dim=40, batch=2, mask="float 1hqk", slopes="bh", sinks=True,
         score_mod="signed_log", options=dict(key_lengths=(100, 71), window=(50, 30), scale=0.3, softcap=5.0, dropout_p=0.2,
                                              **LOWER_RIGHT)),
    Case("everything-packed", 4, 0, 24, kv_heads=2, v_head_dim=40, lengths=PACKED, mask="query b1qk", slopes="bh", sinks=True,
         score_mod="cooling", options=dict(window=(30, 20), scale=0.3, softcap=5.0, dropout_p=0.2)),
    Case("empty-batch-features", 2, 10, 16, batch=0, mask="float bhqk", slopes="bh", sinks=True),
    Case("empty-queries-features", 2, 0, 16, n_k=10, mask="float bhqk", slopes="bh", sinks=True),
    Case("empty-keys-features", 2, 10, 16, n_k=0, mask="float bhqk", slopes="h", sinks=True, options=DROPOUT),
    Case("empty-head-dim", 2, 10, 0, v_head_dim=8, mask="float 11qk"),
]  # fmt: skip

# A dozen that between them meet every feature.
SHORT = (
    "vit-197", "causal", "lower-right-wide", "window", "padded", "gqa-everything", "d80", "layout-strided",
    "bias-of-heads", "dropout-bias", "packed-bias-dropout", "everything",
)  # fmt: skip
