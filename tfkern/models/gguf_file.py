"""GGUF, the file format of llama.cpp: a Llama's weights, sizes and tokenizer in one file, the weights quantised.

The package `gguf` reads the format and expands quantised weights; here they get the order and types that PyTorch wants.
"""

from pathlib import Path

import torch
from torch import Tensor

from tfkern.extras import require


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A Llama's tensors, expanded to float32, by llama.cpp's names, and what the file tells of its sizes.

    Whatever is wrong raises what `gguf` raises, or ValueError.
    """
    gguf = require("gguf", "weights")
    reader = gguf.GGUFReader(path)
    told = {name: entry.contents() for name, entry in reader.fields.items() if not name.startswith("tokenizer.")}
    if told["general.architecture"] != "llama":
        raise ValueError(f"its architecture is {told['general.architecture']}")
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = told["llama.attention.head_count" + ("_kv" if "attn_k" in tensor.name else "")]
            weight = _halves(weight, heads)
        state[tensor.name] = weight
    told |= {"architectures": ["llama.cpp"], "tied": "output.weight" not in state}
    return state, told


def tokenizer_json(path: Path) -> str:
    """The tokenizer of a GGUF file, byte-level BPE as GPT-2's, as the text of a tokenizer.json.

    Raises: ValueError for another kind of tokenizer, or what `gguf` raises.
    """
    gguf, tokenizers = require("gguf", "weights"), require("tokenizers", "demo")
    fields = gguf.GGUFReader(path).fields
    kind, split = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("model", "pre"))
    if kind != "gpt2" or split not in SPLITS:
        raise ValueError(f"its tokenizer is {kind} with {split}, not gpt2 with {' or '.join(SPLITS)}")
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [tokenizers.pre_tokenizers.Digits(individual_digits=True)] if SPLITS[split] else []
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = int(gguf.TokenType.CONTROL)
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == control])
    return tokenizer.to_str()


SPLITS = {"smollm": True, "gpt-2": False}  # how text is split before BPE -> whether each digit stands alone


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head with the pairs that rotary positions turn in two halves, from llama.cpp's order, pair after pair."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
