"""DDP and FSDP2 on two gloo processes: the losses of one process, resume bit for bit, one that prints and writes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern import cli
from tfkern.training import checkpoints
from tfkern.training.checkpoints import CheckpointError
from tfkern.training.distributed import Ranks
from tfkern.training.trainer import Training

sys.path.append(str(Path(__file__).resolve().parent))
from small_trainings import small

pytestmark = pytest.mark.needs("torch.distributed", torch.distributed.is_available())
GPT = ["--rows", "8", "--layers", "2", "--heads", "2", "--width", "16", "--context", "16"]


def torchrun(arguments: list[str]) -> subprocess.Popen:
    """Two processes that torchrun starts."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def workers(process: subprocess.Popen) -> list[int]:
    """What torchrun started: each is in a session of its own."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def end(process: subprocess.Popen) -> None:
    """Let nothing of it run on."""
    if process.poll() is None:
        for pid in (*workers(process), process.pid):
            os.kill(pid, signal.SIGKILL)


def together(arguments: list[str]) -> str:
    """What they print, once they are done."""
    process = torchrun(arguments)
    try:
        out, _ = process.communicate(timeout=240)
    finally:
        end(process)
    assert process.returncode == 0, out
    return out


def test_parts_of_a_batch():
    """Each row is in one part of one process, and every process has as many."""
    rows, other = torch.arange(12), torch.arange(12) + 100
    parts = [Ranks("ddp", rank, 2).parts((rows, other), 3) for rank in (0, 1)]
    assert [len(part) for part in parts] == [3, 3]
    assert all(torch.equal(a + 100, b) and len(a) == 2 for part in parts for a, b in part)
    assert sorted(torch.cat([a for part in parts for a, _ in part]).tolist()) == list(range(12))


def test_torchrun_is_told(tmp_path, capsys, monkeypatch):
    assert cli.main(["train", "gpt", *GPT, "--distributed", "fsdp", "--out", str(tmp_path)]) == 2
    wanted = "--distributed fsdp needs processes that torchrun starts: torchrun --nproc-per-node 2 -m tfkern.cli train"
    assert wanted in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "gpt", *GPT, "--out", str(tmp_path)]) == 2
    assert "torchrun started 2 processes: add --distributed ddp, or fsdp" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rows_for_two_processes():
    with pytest.raises(tfkern.ending.InputError, match="a multiple of --accumulate, 3, times 2 processes, but is 8"):
        small("gpt", rows=8, accumulate=3).recipe.check(2)


def test_another_number_of_processes_is_refused(tmp_path):
    training = Training.start(small("gpt"), tfkern.attention, steps=2)
    training.ranks = Ranks("fsdp", 0, 1)
    training.save(tmp_path / "c")
    with pytest.raises(
        CheckpointError, match=r"by 1 process.es. and --distributed fsdp, but here are 1 and --distributed none"
    ):
        Training.load(tmp_path / "c", tfkern.attention)
    with pytest.raises(CheckpointError, match="but here are 2 and --distributed fsdp; go on by: torchrun --nproc-per-node 1"):
        Training.load(tmp_path / "c", tfkern.attention, ranks=Ranks("fsdp", 0, 2))


PROGRAM = """
import sys
from pathlib import Path

import torch

import tfkern
from tfkern.training import distributed
from tfkern.training.trainer import Training

kind, folder, tests = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
sys.path.append(tests)
from small_trainings import judging, same_weights, small

torch.set_num_threads(1)


def straight(task, device, ranks=distributed.Ranks()):
    training = Training.start(task, tfkern.attention, steps=8, seed=3, device=device, ranks=ranks)
    training.run()
    return training


with distributed.joined(kind) as (ranks, device):
    assert ranks.count == 2
    for name in ("gpt", "bert", "mixer"):
        task = small(name, rows=8, accumulate=2)
        curves = (torch.tensor(straight(task, device, r).losses) for r in (ranks, distributed.Ranks()))
        torch.testing.assert_close(*curves, atol=3e-5, rtol=0)
    task = judging(folder / str(ranks.rank), amp="fp16", accumulate=2)  # with dropout, which each process has its own of
    whole = straight(task, device, ranks)
    first = Training.start(task, tfkern.attention, steps=8, seed=3, device=device, ranks=ranks)
    first.run(until=5)
    path = folder / "c.safetensors"
    first.save(path)
    torch.distributed.barrier()
    assert ranks.gathered(torch.get_rng_state().sum().item())[0] != ranks.gathered(torch.get_rng_state().sum().item())[1]
    torch.manual_seed(99)
    second = Training.load(path, tfkern.attention, device, ranks=ranks)
    second.run()
    assert second.losses == whole.losses
    parts = ((distributed.whole(p), distributed.whole(q)) for p, q in zip(second.model.parameters(), whole.model.parameters()))
    assert all([torch.equal(p, q) for p, q in parts])
    assert isinstance(next(second.model.parameters()).data, torch.distributed.tensor.DTensor) == (kind == "fsdp")
    assert second.score() == whole.score()
    print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(kind, tmp_path):
    """Half the batch each: the losses of one process with all of it, but for the order of sums. And a resume that is exact, with
    fp16, accumulation and dropout."""
    (tmp_path / "program.py").write_text(PROGRAM)
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    out = together([tmp_path / "program.py", kind, tmp_path, Path(__file__).resolve().parent])
    assert out.count("same") == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_and_resumed(kind, tmp_path, capsys):
    """By the command: one process prints, a kill of all leaves a checkpoint, which goes on to the end; and is used alone."""
    command = ["-m", "tfkern.cli", "train", "gpt", "--distributed", kind, "--out", tmp_path]
    path = tmp_path / "gpt.safetensors"
    process = torchrun([*command, "--steps", 100_000, *GPT, "--save-every", "2"])
    try:
        while not path.exists() and process.poll() is None:
            time.sleep(0.05)
        for worker in workers(process):
            os.kill(worker, signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    finally:
        end(process)
    assert len(re.findall("parameters on", out)) == 1, out
    saved = len(checkpoints.read(path)[1]["losses"])
    assert saved >= 2
    process = torchrun([*command, "--resume"])
    try:
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("step") for line in lines)
        process.send_signal(signal.SIGINT)  # which it passes on
        out, _ = process.communicate(timeout=60)
    finally:
        end(process)
    assert "interrupted; --resume goes on from there" in out
    about, tensors = checkpoints.read(path)
    assert len(tensors["losses"]) > saved
    assert about["ranks"] == f'["{kind}", 2]'
    assert cli.main(["generate", "The ", "--count", "3", "--checkpoint", str(path)]) == 0
    assert cli.main(["train", "gpt", "--resume", "--out", str(tmp_path)]) == 2
    assert f"is of a training by 2 process(es) and --distributed {kind}" in capsys.readouterr().err
