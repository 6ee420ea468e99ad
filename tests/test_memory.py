"""eager never allocates N x N: peak memory of a process at N = 16,384, where one head's scores alone would be 1 GiB."""

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
    lengths = {"key_lengths": torch.tensor([n - 5])} if "key_lengths" in options else {}
    tfkern.attention(q, q, q, **{**options, **lengths}).sum().backward()
run(64)
before = peak()
run(%d)
print(json.dumps(peak() - before))
"""


@pytest.mark.parametrize("options", [{}, {"window": (100, 100)}, {"key_lengths": 1}], ids=["fused", "window", "tiled-all-keys"])
def test_peak(options):
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM % N, repr(options)], capture_output=True, text=True, check=True
    )  # fmt: skip
    grown = json.loads(done.stdout)
    assert grown < 4 * N * N / 8, f"{grown / 2**20:.0f} MiB"
