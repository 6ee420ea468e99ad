"""The backend cpu never allocates N x N: peak memory of a process at N = 16,384, where one head's scores alone would be 1 GiB."""

import json
import subprocess
import sys

import pytest

N = 16_384
PROGRAM = """
import json, resource, sys, torch, tfkern
torch.set_num_threads(1)
options = eval(sys.argv[1])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(n):
    q = torch.randn(1, 1, n, 16, requires_grad=True)
    more = {"key_lengths": torch.tensor([n - 5])} if "key_lengths" in options else {}
    if "alibi_slopes" in options:
        more = {"alibi_slopes": torch.ones(1, requires_grad=True), "sinks": torch.ones(1), "attn_mask": torch.zeros(n, requires_grad=True)}
    tfkern.attention(q, q, q, **{**options, **more}).sum().backward()
run(64)
before = peak()
run(%d)
print(json.dumps(peak() - before))
"""


OPTIONS = {
    "fused": {}, "window": {"window": (100, 100)}, "tiled-all-keys": {"key_lengths": 1},
    "dropout": {"dropout_p": 0.1, "is_causal": True}, "features": {"alibi_slopes": 1, "softcap": 5.0, "is_causal": True},
}  # fmt: skip


MORE = {"tiled-all-keys", "features", "dropout"}  # slow tests


@pytest.mark.parametrize(
    "options", [pytest.param(x, id=name, marks=[pytest.mark.slow] * (name in MORE)) for name, x in OPTIONS.items()]
)
def test_peak(options):
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM % N, repr(options)], capture_output=True, text=True, check=True
    )  # fmt: skip
    grown = json.loads(done.stdout)
    assert grown < 4 * N * N / 8, f"{grown / 2**20:.0f} MiB"
