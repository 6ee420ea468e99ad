"""GGUF, the file format of llama.cpp: a Llama's weights, sizes and tokenizer in one file, the weights quantised.

A file is a header of keys with values, the names, shapes and places of tensors, and their bytes. The header is read here, with
every length checked against the file; the package `gguf` expands the quantised weights.

Source: docs/gguf.md of ggml, versions 2 and 3 of the format.
"""

import math
import mmap
import struct
from pathlib import Path

import torch
from torch import Tensor

from tfkern.extras import require

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # kind -> struct's code
TEXT, ARRAY = 8, 9
CONTROL = 3  # kind of a token that no text is read as
SPLITS = {"smollm": True, "gpt-2": False}  # how text is split before BPE -> whether each digit stands alone


class Header:
    """The keys with values, and the tensors, of a GGUF file. ValueError where it is none, or not whole."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = 0
        if self._taken(4) != b"GGUF" or self._number("I") not in (2, 3):
            raise ValueError("it does not begin as GGUF of version 2 or 3")
        tensors, values = self._number("Q"), self._number("Q")
        self.told = {self._text(): self._value(self._number("I")) for _ in range(values)}
        self.tensors = [self._tensor() for _ in range(tensors)]  # (name, shape, kind of numbers, place)
        alignment = self.told.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment!r}")
        self.start = -(-self.at // alignment) * alignment  # of the tensors' bytes

    def bytes_of(self, place: int, size: int) -> memoryview:
        """Bytes of a tensor."""
        self.at = self.start + place
        return memoryview(self._taken(size))

    def _taken(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def _number(self, code: str) -> int | float:
        return struct.unpack("<" + code, self._taken(struct.calcsize("<" + code)))[0]

    def _text(self) -> str:
        return self._taken(self._number("Q")).decode("utf-8")

    def _value(self, kind: int) -> object:
        if kind == TEXT:
            return self._text()
        if kind != ARRAY:
            return self._number(_code(kind))
        kind, count = self._number("I"), self._number("Q")
        if kind == TEXT:
            return [self._text() for _ in range(count)]
        code = _code(kind)
        return list(struct.unpack(f"<{count}{code}", self._taken(count * struct.calcsize("<" + code))))

    def _tensor(self) -> tuple[str, list[int], int, int]:
        name, dims = self._text(), self._number("I")
        return name, [self._number("Q") for _ in range(dims)][::-1], self._number("I"), self._number("Q")


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A Llama's tensors by llama.cpp's names, expanded to float32, and the sizes that the file records.

    Raises: ValueError for a damaged file, another architecture, or numbers that `gguf` can't expand.
    """
    header = Header(path)
    told = {name: value for name, value in header.told.items() if not name.startswith("tokenizer.")}
    if told.get("general.architecture") != "llama":
        raise ValueError(f"its architecture is {told.get('general.architecture')}")
    state = {}
    for name, shape, kind, place in header.tensors:
        weight = _expanded(header, name, shape, kind, place)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _halves(weight, told.get("llama.attention.head_count" + ("_kv" if "attn_k" in name else "")))
        state[name] = weight
    keys = ("rope.dimension_count", "attention.head_count", "embedding_length")
    turned, heads, width = sizes = [told.get(f"llama.{key}") for key in keys]
    if turned is not None and not (all(type(size) is int for size in sizes) and turned * heads == width):
        raise ValueError(f"rotary positions turn {turned} dimensions of each head, not all of {width} / {heads}")
    told |= {"architectures": ["llama.cpp"], "tied": "output.weight" not in state}
    return state, told


def tokenizer_json(path: Path) -> str:
    """The tokenizer of a GGUF file, byte-level BPE as GPT-2's, as the text of a tokenizer.json.

    Raises: ValueError for a damaged file, or another kind of tokenizer.
    """
    tokenizers, told = require("tokenizers", "weights"), Header(path).told
    model, split, tokens, kinds, merges = (
        told.get(f"tokenizer.ggml.{name}") for name in ("model", "pre", "tokens", "token_type", "merges")
    )
    if model != "gpt2" or split not in SPLITS:
        raise ValueError(f"its tokenizer is {model} with {split}, not gpt2 with {' or '.join(SPLITS)}")
    if not all(isinstance(x, list) for x in (tokens, kinds, merges)):
        raise ValueError("its tokenizer lacks tokens, their types or merges")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    try:
        bpe = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(x.split(" ")) for x in merges])
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"its tokens or merges are no BPE ({error})") from None
    tokenizer = tokenizers.Tokenizer(bpe)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [tokenizers.pre_tokenizers.Digits(individual_digits=True)] if SPLITS[split] else []
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()


def _code(kind: int) -> str:
    if kind not in NUMBERS:
        raise ValueError(f"it has values of the unknown kind {kind}")
    return NUMBERS[kind]


def _expanded(header: Header, name: str, shape: list[int], kind: int, place: int) -> Tensor:
    """A tensor in float32. Rows are stored in blocks of so many numbers, each in so many bytes."""
    numpy, gguf = require("numpy", "weights"), require("gguf", "weights")
    try:
        kind = gguf.GGMLQuantizationType(kind)
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % numbers:
            raise ValueError(f"{name} has the shape {shape}, not of whole blocks of {numbers}")
        stored = [*shape[:-1], shape[-1] // numbers * size]
        data = numpy.frombuffer(header.bytes_of(place, math.prod(stored)), numpy.uint8).reshape(stored)
        return torch.tensor(gguf.quants.dequantize(data, kind), device="cpu")
    except (NotImplementedError, KeyError) as error:
        raise ValueError(f"{name} can't be expanded ({error})") from None


def _halves(weight: Tensor, heads: object) -> Tensor:
    """Rows of each head with the pairs that rotary positions turn in two halves, from llama.cpp's order, pair after pair."""
    if type(heads) is not int or heads < 1 or len(weight) % (2 * heads):
        raise ValueError(f"{len(weight)} rows can't be {heads} heads")
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
