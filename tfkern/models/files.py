"""Files of weights: safetensors, or PyTorch's pickles without running code from them; whole, or in shards."""

import json
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from tfkern.extras import require

NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class WeightsError(ValueError):
    """Weights that can't be read, or that don't fit the model; the message says what is wrong and what to do."""


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
    """The tensors of a file by their names, on the CPU, and the sizes that nanoGPT's checkpoints tell beside them, else {}."""
    if path.name.endswith(".index.json"):
        return _shards(path), {}
    if path.suffix == ".safetensors":
        return _safetensors(path), {}
    held = _pickled(path)
    if isinstance(held, dict) and isinstance(held.get("model"), dict):  # nanoGPT's, with its optimizer and settings
        return _tensors(path, held["model"]), dict(held.get("model_args", {}))
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    return _tensors(path, held), {}


def read_json(path: Path) -> dict:
    """A JSON object of a file."""
    try:
        held = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} can't be read as JSON ({error})") from None
    if not isinstance(held, dict):
        raise WeightsError(f"{path} must hold a JSON object, but holds a {type(held).__name__}")
    return held


def _safetensors(path: Path) -> dict[str, Tensor]:
    require("safetensors", "demo")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); get it again") from None


def _pickled(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
        raise WeightsError(
            f"{path} is no file of weights alone, and nothing of it was run ({reason.strip() or 'not a pickle of tensors'}); "
            "get the weights as safetensors"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} is not a whole file of weights ({str(error).splitlines()[0]}); get it again") from None


def _tensors(path: Path, held: object) -> dict[str, Tensor]:
    """A state dict, without the prefix that torch.compile adds."""
    if not isinstance(held, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items()):
        raise WeightsError(f"{path} must hold a state dict, names with tensors, but holds something else")
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in held.items()}


def _shards(index: Path) -> dict[str, Tensor]:
    """All tensors of the files that an index names. They must lie beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(f"{index} must have a weight_map of names of weights and files")
    held = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise WeightsError(f"{index} names the file {name!r}, which is not beside it")
        held |= read(index.parent / name)[0]
    return held
