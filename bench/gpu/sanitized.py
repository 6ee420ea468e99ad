"""Run a few small problems, forward and backward, under compute-sanitizer.

usage: compute-sanitizer python -m tfkern.bench.gpu.sanitized {portable,hopper}
"""

import sys
from collections.abc import Iterator

import torch

from tfkern import testing
from tfkern.bench.gpu import smoke
from tfkern.testing import CAUSAL, Case

PORTABLE = [
    Case("full", 2, 37, 64),
    Case("causal", 2, 70, 64, options=CAUSAL),
    Case("groups", 4, 40, 40, kv_heads=2),
    Case("window", 1, 100, 64, options=dict(window=(20, 9))),
    Case("padded", 2, 60, 64, batch=2, options=dict(key_lengths=(60, 7))),
    Case("packed", 2, 0, 64, lengths=((21, 0, 34), (37, 20, 18))),
    Case("everything", 2, 50, 64, mask="float bhqk", sinks=True, slopes="bh", options=dict(dropout_p=0.3, softcap=2.0)),
]


def portable(device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield (case, its wrong results) of the portable kernels. The text is empty if all results are right."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for case in PORTABLE:
        yield case.name, "; ".join(str(e) for e in testing.check(case, dtype, "portable", device) if not e.ok)


def hopper(device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield (form, what is wrong) of each form of the kernels for Hopper. The text is empty if nothing is wrong. Without a
    GPU the launches do nothing."""
    for form in smoke.FORMS:
        for row in smoke.rows(form, device, dry=device.type == "cpu"):
            yield form, row.get("problem", "")


def main(backend: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case, wrong in {"portable": portable, "hopper": hopper}[backend](device):
        if wrong:
            raise SystemExit(f"{case}: {wrong}")
        print(case, "right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
