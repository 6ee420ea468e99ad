"""Files of weights that are damaged or hostile: each is loaded or refused in one line, and nothing of it is run."""

import json
import os
import pickle
import random
import struct
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tfkern.models import files, from_pretrained, save_pretrained
from tfkern.models.files import WeightsError

sys.path.append(str(Path(__file__).resolve().parent))
from small_gpt import TINY, gpt, same, save_bin, saved


def refused(path) -> str:
    """The one line with which a file of weights is refused."""
    with pytest.raises(WeightsError) as error:
        from_pretrained(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_cut_files(kind, tmp_path):
    """At every kind of place: within the length, the header, the tensors, the list at the end of a zip file."""
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    if kind == "bin":
        state = files.read(file)[0]
        file.unlink()
        file = save_bin(tmp_path, state)
    content = file.read_bytes()
    for length in [*range(16), *range(16, len(content), len(content) // 40), *range(len(content) - 30, len(content))]:
        file.write_bytes(content[:length])
        assert str(file) in refused(tmp_path)
    file.write_bytes(content)
    from_pretrained(tmp_path)


@pytest.mark.parametrize("files_changed", [40, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle", pytest.param("nanoGPT", marks=pytest.mark.slow)])
def test_changed_bytes(kind, files_changed, tmp_path):
    """Wherever bytes are changed, the file is loaded or refused in one line. PyTorch's reader fails in many ways of its own."""
    model = gpt(replace(TINY, vocab_size=5, layers=1, heads=1, width=4, gelu="none"))
    save_pretrained(model, tmp_path, "nanoGPT" if kind == "nanoGPT" else "transformers")
    file = next(tmp_path / name for name in files.NAMES if (tmp_path / name).exists())
    if kind in ("zip", "pickle"):
        state = files.read(file)[0]
        file.unlink()
        file = tmp_path / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    content, chance, told = file.read_bytes(), random.Random(0), []
    for _ in range(files_changed):
        changed = bytearray(content)
        for _ in range(chance.choice([1, 3, 20])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        file.write_bytes(changed)
        try:
            from_pretrained(tmp_path)
        except WeightsError as error:
            told.append(str(error))
    assert len(told) > files_changed // 12
    assert all("\n" not in text or "don't fit" in text for text in told)


def header(tensors: dict, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, start, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
        header({"a": entry([4], 0, 16)}),
        header({"a": entry([4], -16, 0)}, b"0" * 16),
        header({"a": entry([4], 100, 116)}, b"0" * 16),
        header({"a": entry([2**62, 8], 0, 16)}, b"0" * 16),
        header({"a": entry([5], 0, 16)}, b"0" * 16),
        header({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, b"0" * 16),
        header({"a": entry([4], 0, 16, "F99")}, b"0" * 16),
        header({"a": 5}, b"0" * 16),
        header({"a": entry("x", 0, 16)}, b"0" * 16),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_hostile_safetensors(content, tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors is not a whole safetensors file" in refused(tmp_path)


class Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_run_nothing(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for hidden in (Bomb(tmp_path / "a"), {"wte.weight": Bomb(tmp_path / "a")}, gpt()):
        assert "nothing of it was run" in refused(save_bin(tmp_path, hidden))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "a"), 2))
    assert "nothing of it was run" in refused(tmp_path)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04" + b"\x00" * 100, b"hello", pickle.dumps([1], 2), b"\x80\x02."])
def test_what_is_no_pickle_of_weights(content, tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in refused(tmp_path)


def test_zip_without_a_pickle(tmp_path):
    saved(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as file:
        file.writestr("archive/data.pkl", b"")
    assert "other.bin" in refused(tmp_path / "other.bin")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.ones(1)], "must hold a state dict"),
        ({"a": 5}, "must hold a state dict"),
        ({3: torch.ones(1)}, "must hold a state dict"),
        ({"model": {"a": 1}}, "must hold a state dict"),
        ({"a": torch.eye(3).to_sparse()}, "must hold dense tensors, but a is none"),
        ({"a": torch.ones(2, device="meta")}, "must hold dense tensors, but a is none"),
    ],
)
def test_pickles_of_something_else(held, message, tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert message in refused(save_bin(tmp_path, held))


def test_lightning_checkpoints(tmp_path):
    model = saved(tmp_path)
    state = files.read(tmp_path / "model.safetensors")[0]
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    assert same(from_pretrained(tmp_path / "last.ckpt"), model)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "", ".", "model.safetensors.index.json", "gone.safetensors", "config.json"]
)
def test_shards_lie_beside_their_index(name, tmp_path):
    folder = tmp_path / "inner"
    saved(tmp_path)
    saved(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    files.write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": "a.safetensors"}})
    from_pretrained(folder)
    files.write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": name}})
    assert f"names the file {name!r}, which must be" in refused(folder)
    for wrong in ({}, {"weight_map": 3}, {"weight_map": {"x": 3}}):
        files.write_json(folder / "model.safetensors.index.json", wrong)
        assert "must have a weight_map" in refused(folder)
