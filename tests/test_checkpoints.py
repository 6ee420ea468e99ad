"""Checkpoints: whole or not at all, refused where damaged or of others, resumable after a kill at any moment."""

import contextlib
import dataclasses
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern.training import checkpoints, data
from tfkern.training.checkpoints import CheckpointError
from tfkern.training.trainer import Training

sys.path.append(str(Path(__file__).resolve().parent))
from small_trainings import small


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    training = Training.start(small("vit"), tfkern.attention, steps=2)
    training.save(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        assert os.fstat(descriptor).st_size
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    training.step()
    with pytest.raises(OSError, match=r"the checkpoint can't be written .no space"):
        training.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up(tmp_path):
    """As the writer of safetensors meets it."""
    training, limits = Training.start(small("vit"), tfkern.attention, steps=2), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"the checkpoint can't be written .*File too large"):
            training.save(tmp_path / "c.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        Training.load(tmp_path / "absent", tfkern.attention)
    (tmp_path / "broken").write_bytes(b"not a checkpoint at all")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Training.load(tmp_path / "broken", tfkern.attention)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match=r"no checkpoint of `tfkern train` \(format None\)"):
        Training.load(tmp_path / "foreign", tfkern.attention)


def test_others_may_read_it(tmp_path):
    """As far as the umask allows."""
    before = os.umask(0o027)
    try:
        checkpoints.write(tmp_path / "c", {}, {"x": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o640


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint."""
    training = Training.start(small("vit"), tfkern.attention, steps=2)
    training.step()
    training.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def test_a_flipped_bit_anywhere_is_noticed(saved):
    """In the header, where it may leave good JSON, and in what tensors hold."""
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = [*range(0, header, 37), *torch.randint(header, len(whole), (50,), generator=generator).tolist()]
    for number, place in enumerate(places):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << number % 8]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|not a whole|no checkpoint of|of another version"):
            checkpoints.read(saved)
    saved.write_bytes(whole)
    assert len(Training.load(saved, tfkern.attention).losses) == 1


@pytest.mark.parametrize("length", [0, 7, 8, 1000, -1])
def test_a_truncated_checkpoint(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Training.load(saved, tfkern.attention)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format="tfkern-training-2"), "of another version of tfkern .*'tfkern-training-2', here 'tfkern-training-3'"),
        (dict(format="pt"), "no checkpoint of `tfkern train`"),
        (dict(kind="llama"), "of another version's llama"),
        (dict(config='{"rotary": true}'), "of another version's vit .*rotary"),
        (
            dict(config='{"image": 8, "patch": 2, "channels": 1, "width": 48}'),
            "of another version's vit .*loading state_dict for ViT:.; train anew$",
        ),
        (dict(recipe='{"steps": 2}'), "of another version's vit .*betas"),
        (
            dict(source='{"path": null, "digest": "0"}'),
            "can't go on: another Python's text, or other digits, are built in here",
        ),
        (
            dict(ranks='["ddp", 2]'),
            "training by 2 process.es. and --distributed ddp, but here are 1 .*torchrun --nproc-per-node 2 .*--resume$",
        ),
    ],
)
def test_checkpoints_of_others(saved, change, message):
    """Whole, with a checksum that is right."""
    from safetensors.torch import save_file

    about, tensors = checkpoints.read(saved)
    about |= change
    save_file(tensors, saved, {**about, "sha256": checkpoints.checksum(about, tensors)})
    with pytest.raises(CheckpointError, match=message):
        Training.load(saved, tfkern.attention)


def test_a_checkpoint_of_another_model(saved):
    assert Training.load(saved, tfkern.attention, model="vit").task.name == "vit"
    with pytest.raises(CheckpointError, match="is of vit, but gpt is wanted; `tfkern train gpt` makes one"):
        Training.load(saved, tfkern.attention, model="gpt")


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; name a file"):
        Training.load(tmp_path, tfkern.attention)
    with pytest.raises(CheckpointError, match="can't be read"):
        Training.load(Path("/dev/null"), tfkern.attention)


def test_text_of_another_python_is_refused(tmp_path, monkeypatch):
    Training.start(small("gpt"), tfkern.attention, steps=1).save(tmp_path / "c")
    for text in ("The quick brown fox. " * 100, "日本語 " * 300):  # of characters that the model knows, and others
        monkeypatch.setattr(data, "text", lambda text=text: text)
        with pytest.raises(CheckpointError, match="another Python's text"):
            Training.load(tmp_path / "c", tfkern.attention)


def test_what_a_kill_left_does_not_disturb(saved):
    partial = saved.with_name(saved.name + ".partial")
    partial.write_bytes(b"half")
    training = Training.load(saved, tfkern.attention)
    training.step()
    training.save(saved)
    assert not partial.exists()
    assert len(Training.load(saved, tfkern.attention).losses) == 2


KILLED = """
import os, random, signal, struct, sys, time
from pathlib import Path
import torch
import tfkern
from tfkern.training import checkpoints
from tfkern.training.trainer import Training

torch.set_num_threads(1)
path, rounds, random_ = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)
Training.load(path, tfkern.attention)  # the data is read once, for all that are forked
saved, whole = 1, 0
for _ in range(rounds):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        training = Training.load(path, tfkern.attention)
        os.write(writer, b"x")
        while True:
            training.step()
            begun = time.perf_counter()
            training.save(path)
            os.write(writer, struct.pack("d", time.perf_counter() - begun))
    os.read(reader, 1)
    (took,) = struct.unpack("d", os.read(reader, 8))
    time.sleep(random_.uniform(0.0, 2.0) * took)  # while another step is made, saved, or done
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    about, tensors = checkpoints.read(path)
    done = len(tensors["losses"])
    assert done > saved, (done, saved)
    assert {p.name for p in path.parent.iterdir()} <= {path.name, path.name + ".partial"}
    saved, whole = done, whole + 1
print(whole, saved)
"""


def killed(path: Path, rounds: int) -> tuple[int, int]:
    """(how often a checkpoint was whole after a kill, steps done in all) of a training killed while it does nothing but save."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", KILLED, str(path), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, saved = done.stdout.split()
    return int(whole), int(saved)


class Killed(BaseException):
    """Nothing in a save handles it, as nothing handles a kill."""


@pytest.mark.parametrize("moment", range(5))
def test_an_end_at_each_moment_of_a_save(saved, monkeypatch, moment):
    """With half of it written, before it is on the disk, before and after it takes its name, and at the end."""
    moments = iter(range(5))

    def until(act):
        def run(*arguments):
            if next(moments) == moment:
                raise Killed
            act(*arguments)

        return run

    def in_halves(path, mode, opened=Path.open):
        file = opened(path, mode)
        write = file.write

        def halves(content):
            write(content[: len(content) // 2])
            until(write)(content[len(content) // 2 :])

        file.write = halves
        return file

    training = Training.load(saved, tfkern.attention)
    training.step()
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Path, "open", in_halves)
        patch.setattr(os, "fsync", until(os.fsync))
        patch.setattr(os, "replace", until(os.replace))
        training.save(saved)
    assert {path.name for path in saved.parent.iterdir()} <= {saved.name, saved.name + ".partial"}
    assert len(checkpoints.read(saved)[1]["losses"]) == (1 if moment < 3 else 2)
    training.save(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert len(checkpoints.read(saved)[1]["losses"]) == 2


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    """Whatever moment the kill comes, the file is whole, and what it goes on to is what an undisturbed training does."""
    task = small("gpt")  # whose data takes no scikit-learn
    task = dataclasses.replace(task, config=dataclasses.replace(task.config, width=128))  # a file that takes a while to write
    straight = Training.start(task, tfkern.attention, steps=100_000)
    straight.step()
    straight.save(tmp_path / "c.safetensors")
    whole, saved = killed(tmp_path / "c.safetensors", 60)
    assert whole == 60
    straight.run(until=saved + 2)
    resumed = Training.load(tmp_path / "c.safetensors", tfkern.attention)
    resumed.run(until=saved + 2)
    assert resumed.losses == straight.losses
