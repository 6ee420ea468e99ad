"""Peak memory on a CPU of a forward and backward of two heads, beyond the inputs, gradients included, each in its own
process. The bias is one number for each key, so that it has no N x N elements itself."""

import json
import subprocess
import sys
from collections.abc import Iterator

LENGTHS = (2048, 4096, 8192, 16384)
NAIVE_LENGTH = 4096  # the longest for the naive formula, whose scores alone take 512 MiB at 8192
CASES = {
    "full": {},
    "softcap": dict(softcap=20.0),
    "dropout": dict(dropout_p=0.1),
    "gradient of a bias of keys": dict(bias=True),
}
PROGRAM = """
import json, re, sys, torch, tfkern
from tfkern.bench import cpu_cases
who, n, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
function = tfkern.attention if who == "tfkern" else cpu_cases.naive
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
def leaves(n):
    made = [torch.randn(1, 2, n, 64) for _ in range(3)] + ([torch.randn(1, 2, 1, n)] if "bias" in options else [])
    return [x.requires_grad_() for x in made]
more = {name: x for name, x in options.items() if name != "bias"}
def run(own): torch.autograd.grad(function(*own, **more), own, torch.ones(own[0].shape))
run(leaves(64))
own = leaves(n)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is what there is now
before = peak()
run(own)
print(json.dumps(peak() - before))
"""


def run(lengths=LENGTHS) -> Iterator[dict]:
    """A row for each case, length and provider, with bytes. Needs Linux's /proc."""
    if not sys.platform.startswith("linux"):
        return
    for case, options in CASES.items():
        for length in lengths:
            for provider in ("tfkern", "naive"):
                about = dict(memory=case, length=length, provider=provider)
                if provider == "naive" and length > NAIVE_LENGTH:
                    yield dict(about, skipped="its scores would take too much")
                    continue
                command = [sys.executable, "-I", "-c", PROGRAM, provider, str(length), json.dumps(options)]
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    yield dict(about, problem=done.stderr.strip().splitlines()[-1])
                else:
                    yield dict(about, bytes=json.loads(done.stdout))


def table(rows: list[dict]) -> str:
    """MiB in Markdown."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| MiB at N = | " + " | ".join(map(str, lengths)) + " |", "| --- |" + " --- |" * len(lengths)]
    for case, provider in dict.fromkeys((row["memory"], row["provider"]) for row in rows):
        found = {row["length"]: row for row in rows if (row["memory"], row["provider"]) == (case, provider)}
        cells = (f"{row['bytes'] / 2**20:.0f}" if "bytes" in (row := found[n]) else row.get("problem", "-") for n in lengths)
        lines.append(f"| {case}, {provider} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
