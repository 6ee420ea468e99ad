"""A few small problems, forward and backward, for compute-sanitizer to watch.

usage: compute-sanitizer python -m tfkern.bench.sanitized
"""

import torch

from tfkern import testing
from tfkern.testing import Case

CASES = [
    Case("full", 2, 37, 64),
    Case("causal", 2, 70, 64, options=dict(is_causal=True)),
    Case("groups", 4, 40, 40, kv_heads=2),
    Case("window", 1, 100, 64, options=dict(window=(20, 9))),
    Case("padded", 2, 60, 64, batch=2, options=dict(key_lengths=(60, 7))),
    Case("packed", 2, 0, 64, lengths=((21, 0, 34), (37, 20, 18))),
    Case("everything", 2, 50, 64, mask="float bhqk", sinks=True, slopes="bh", options=dict(dropout_p=0.3, softcap=2.0)),
]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for case in CASES:
        errors = testing.check(case, dtype, "portable", device)
        if wrong := [str(e) for e in errors if not e.ok]:
            raise SystemExit(f"{case.name}: {'; '.join(wrong)}")
        print(case.name, "right")


if __name__ == "__main__":
    main()
