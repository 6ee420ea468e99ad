"""Checkpoint files: safetensors, whole or not at all, with a checksum of everything in them."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from tfkern.ending import InputError
from tfkern.whole import write_whole

PREFIX = "tfkern-training-"
FORMAT = PREFIX + "3"
Contents = tuple[dict[str, str], dict[str, Tensor]]


class CheckpointError(InputError):
    """A file that is no checkpoint of this training; the message says what is wrong and what to do."""


def write(path: Path, about: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Write one file. An end at any moment leaves the file as it was, or the new one whole.

    OSError, and nothing left behind, if it can't be written.
    """
    from safetensors.torch import save

    about = {"format": FORMAT, **about}
    about["sha256"] = checksum(about, tensors)
    try:
        # save_file would write to a name of its own, which a kill leaves behind.
        write_whole(path, lambda file: file.write(save(tensors, about)))
    except OSError as error:
        raise OSError(error.errno, f"the checkpoint can't be written ({error.strerror})", str(path)) from None


def is_one(path: Path) -> bool:
    """Whether a file is a checkpoint of `tfkern train`, of any version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("format")).startswith(PREFIX)
    except (OSError, SafetensorError):
        return False


def read(path: Path) -> Contents:
    """What `write` wrote. CheckpointError if the file is not whole, or not of this format."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file in it that `tfkern train` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            # Copies: safetensors maps the file, whose pages would change with it.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; `tfkern train` writes one") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error}); name a file that `tfkern train` wrote") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); remove it and train anew") from None
    found = about.get("format")
    if not str(found).startswith(PREFIX):
        raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of `tfkern train` (format {found!r})")
    if found != FORMAT:
        raise CheckpointError(f"{path} is of another version of tfkern (format {found!r}, here {FORMAT!r}); train anew")
    if about.pop("sha256", None) != checksum(about, tensors):
        raise CheckpointError(f"{path} is damaged: its contents don't have the checksum that it was written with; train anew")
    return about, tensors


def checksum(about: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all that a checkpoint says."""
    found = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
