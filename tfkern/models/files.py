"""Files of weights: safetensors, PyTorch's pickles without running code from them, whole or in shards, and GGUF.

Whatever a file holds, reading it gives tensors or raises a WeightsError of one line. A file is written whole or not at all.
"""

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tfkern.extras import require
from tfkern.models import gguf_file
from tfkern.whole import write_whole

NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "ckpt.pt",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class WeightsError(ValueError):
    """The weights can't be read, or don't fit the model. The message says what is wrong and what to do."""


def weights_file(path: Path) -> Path:
    """The file of weights that a path names: itself, or the one in a folder."""
    if not path.exists():
        raise WeightsError(f"there is no {path}; name a folder with {NAMES[0]} or {NAMES[2]}, or such a file")
    if not path.is_dir():
        return path
    found = next((path / name for name in NAMES if (path / name).is_file()), None)
    if found is None:
        raise WeightsError(f"{path} has none of {', '.join(NAMES)}; name the file itself")
    return found


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file by their names, on the CPU, and the sizes of the model that the file records, else {}.

    nanoGPT's checkpoints and GGUF tell them. `architectures` is then "nanoGPT", or GGUF's name of the architecture.
    """
    if path.name.endswith(".index.json"):
        return _shards(path), {}
    if path.suffix == ".safetensors":
        return _tensors(path, _safetensors(path)), {}
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.suffix not in PICKLES:
        endings = ", ".join((".safetensors", ".gguf", *PICKLES))
        raise WeightsError(f"{path} must end in one of {endings}, which tells how to read it, but ends in {path.suffix!r}")
    held = _pickled(path)
    if isinstance(held, dict) and isinstance(held.get("model"), dict):  # nanoGPT's, with its optimizer and settings
        told = held.get("model_args")
        return _tensors(path, held["model"]), {**told, "architectures": ["nanoGPT"]} if isinstance(told, dict) else {}
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    return _tensors(path, held), {}


def read_json(path: Path, kind: type = dict) -> dict | list:
    """What a JSON file holds: an object, or with kind=list an array."""
    try:
        held = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} can't be read as JSON ({line(error)})") from None
    if not isinstance(held, kind):
        raise WeightsError(f"{path} must hold a JSON {kind.__name__}, but holds a {type(held).__name__}")
    return held


def write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    """Tensors by their names. OSError where the disk refuses."""
    require("safetensors", "weights")
    from safetensors.torch import save

    # save_file would write to a name of its own, which a kill leaves behind.
    _write(path, lambda file: file.write(save(state, {"format": "pt"})))


def write_json(path: Path, told: dict) -> None:
    """A JSON object. OSError where the disk refuses."""
    _write(path, lambda file: file.write(f"{json.dumps(told, indent=2)}\n".encode()))


def write_nanogpt(path: Path, state: dict[str, Tensor], sizes: dict) -> None:
    """A checkpoint of nanoGPT, as its sample.py reads it. OSError where the disk refuses."""
    _write(path, lambda file: torch.save({"model": state, "model_args": sizes}, file))


def line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters of it, or the error's kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all. Its folder is made if it isn't there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)


def _safetensors(path: Path) -> dict[str, Tensor]:
    require("safetensors", "weights")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({line(error)}); get it again") from None


def _gguf(path: Path) -> tuple[dict[str, Tensor], dict]:
    require("gguf", "weights")
    try:
        state, told = gguf_file.read(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a whole GGUF file of a Llama ({line(error)}); get it again") from None
    return _tensors(path, state), told


def _pickled(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch tells that a pickle looks odd, before it refuses it
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((text for text in str(error).splitlines() if "GLOBAL" in text or "Unsupported" in text), "no tensors")
        raise WeightsError(
            f"{path} is no file of weights alone, and nothing of it was run ({reason.strip()[:200]}); get it as safetensors"
        ) from None
    except Exception as error:  # a damaged pickle fails anywhere in torch.load, with any kind of error
        raise WeightsError(f"{path} is not a whole file of weights ({line(error)}); get it again") from None


def _tensors(path: Path, held: object) -> dict[str, Tensor]:
    """A state dict without the prefixes that torch.compile and DistributedDataParallel add to names."""
    if not isinstance(held, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items()):
        raise WeightsError(f"{path} must hold a state dict, names with tensors, but holds something else")
    if odd := [name for name, x in held.items() if x.layout != torch.strided or x.is_quantized or x.device.type != "cpu"]:
        raise WeightsError(f"{path} must hold dense tensors, but {odd[0]} is none; save it anew as one")
    plain = {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in held.items()}
    if len(plain) < len(held):
        raise WeightsError(
            f"{path} must hold each weight once, but holds some with and without _orig_mod. or module. before it"
        )
    return plain


def _shards(index: Path) -> dict[str, Tensor]:
    """All tensors of the files that an index names. They must lie beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(f"{index} must have a weight_map of names of weights and files")
    held = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if Path(name).name != name or shard.suffix not in (".safetensors", ".bin") or not shard.is_file():
            raise WeightsError(f"{index} names the file {name!r}, which must be a .safetensors or .bin beside it, but is not")
        held |= read(shard)[0]
    return held
