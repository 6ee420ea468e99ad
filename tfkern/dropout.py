"""Host side of dropout: the seed, and the bits of kernels/dropout.py computed by PyTorch operations."""

import math

import torch
from torch import Tensor

STEPS = 1 << 16  # probabilities come in steps of 1 / STEPS
ROUNDS = 7
SEEDS = 0, 2**63 - 1  # the first, and one beyond the last
_WORD = 0xFFFFFFFF
_FACTORS = 0xD2511F53, 0xCD9E8D57
_SIGNS = -0x7FFF7FFF7FFF8000  # 0x8000 in each of four 16-bit numbers, which gives them the order of int16


def draw_seed(device: torch.device) -> Tensor:
    """Two random int64 from torch's generator of the device: a key and an offset. `torch.manual_seed` governs them,
    checkpointing replays them, and a CUDA graph draws new ones each time it runs."""
    return torch.randint(*SEEDS, (2,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """The number of STEPS equally likely values whose weights are dropped: those below it."""
    return math.floor(dropout_p * STEPS + 0.5)


def factor(dropout_p: float) -> float:
    """The factor of kept probabilities, which preserves their mean."""
    kept = STEPS - threshold(dropout_p)
    return STEPS / kept if kept else 0.0


def keep(
    seed: Tensor, dropout_p: float, bh: Tensor, rows: Tensor, first: int, stop: int, dtype: torch.dtype = torch.bool
) -> Tensor:
    """True, or 1 in `dtype`, where an element survives, for keys [first, stop) along the last dim. bh = sequence * heads + head
    and the query rows are int64 tensors that broadcast, with a last dim of 1. kernels/dropout.py describes the layout of the
    bits."""
    groups = torch.arange(first // 8, (stop + 7) // 8, device=seed.device)
    pairs = _philox(groups, rows, bh, seed[1] & _WORD, _keys(seed[0] & _WORD, seed[0] >> 32, ROUNDS, _SIGNS))
    words = pairs.new_empty((*pairs.shape[1:], 2))
    for i, (high, low) in enumerate(zip(_high(pairs), pairs.bitwise_left_shift_(32), strict=True)):
        torch.bitwise_or(high, low, out=words[..., i])  # little-endian memory has the low half, the first word, first
    numbers = words.view(torch.int16).flatten(-2)[..., first % 8 : first % 8 + stop - first]
    survives = torch.empty(numbers.shape, dtype=dtype, device=seed.device)
    limit = threshold(dropout_p)
    return torch.ge(numbers, limit - STEPS // 2, out=survives) if limit < STEPS else survives.zero_()


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0, k1, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Philox-4x32 (Salmon et al., 2011): four random words for counters c and a key k, all words in int64 tensors."""
    k0, k1 = (torch.as_tensor(k, device=c0.device) for k in (k0, k1))
    return tuple(word for pair in _philox(c0, c1, c2, c3, _keys(k0, k1, rounds)) for word in (_high(pair), pair & _WORD))


def _keys(k0: Tensor, k1: Tensor, rounds: int, flips: int = 0) -> list[Tensor]:
    """The two words of each round's key, int64 (2,), in the high half, where they are xored. The last key is xored with
    `flips`."""
    steps = torch.arange(rounds, device=k0.device)
    keys = torch.stack([k0 + steps * 0x9E3779B9, k1 + steps * 0xBB67AE85], 1) << 32
    keys[-1] ^= flips
    return list(keys)


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, keys: list[Tensor]) -> Tensor:
    """The four words as pairs (2, …) int64, each with its first word in the high half.

    A round multiplies c0 and c2. Each product, a pair of words, becomes the other's new pair when its high word is xored with
    an old second word and the key. int64 products wrap, which leaves their bits right. Counters that broadcast stay small until
    the second round has mixed them."""
    for key in keys[:2]:
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]
        x, y = ((c1 << 32) ^ key[0]) ^ second, ((c3 << 32) ^ key[1]) ^ first
        c0, c1, c2, c3 = _high(x), x, _high(y), y  # the next shift discards the high halves of c1 and c3
    pairs = torch.stack(torch.broadcast_tensors(x, y))
    products, factors = torch.empty_like(pairs), pairs.new_tensor(_FACTORS)
    each = (2,) + (1,) * x.dim()
    for key in keys[2:]:
        torch.bitwise_right_shift(pairs, 32, out=products).bitwise_and_(_WORD).mul_(factors.view(each))
        pairs.bitwise_left_shift_(32).bitwise_xor_(key.view(each))
        pairs[0].bitwise_xor_(products[1])
        pairs[1].bitwise_xor_(products[0])
    return pairs


def _high(pair: Tensor) -> Tensor:
    """The word of the high half, moved to the low half."""
    return (pair >> 32).bitwise_and_(_WORD)
