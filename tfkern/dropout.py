"""The host's side of dropout: the seed, and the bits that kernels/dropout.py makes, made by PyTorch."""

import math

import torch
from torch import Tensor

STEPS = 1 << 16  # probabilities come in steps of 1 / STEPS
ROUNDS = 7
SEEDS = 0, 2**63 - 1  # the first, and one beyond the last
_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """Two random int64 from torch's generator of the device: a key and an offset. `torch.manual_seed` governs them,
    checkpointing replays them, and a CUDA graph draws new ones each time it runs."""
    return torch.randint(*SEEDS, (2,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """Of STEPS equally likely numbers, those below it drop."""
    return math.floor(dropout_p * STEPS + 0.5)


def factor(dropout_p: float) -> float:
    """What kept probabilities are scaled by, so that their mean stays."""
    kept = STEPS - threshold(dropout_p)
    return STEPS / kept if kept else 0.0


def keep(seed: Tensor, dropout_p: float, bh: Tensor, rows: Tensor, first: int, stop: int) -> Tensor:
    """True where an element survives, for keys [first, stop) along the last dim. bh = sequence * heads + head and the query
    rows are int64 tensors that broadcast, with a last dim of 1. The layout of the bits is told in kernels/dropout.py."""
    groups = torch.arange(first // 8, (stop + 7) // 8, device=seed.device)
    zero = torch.zeros_like(bh + rows + groups)
    words = philox(groups + zero, rows + zero, bh + zero, (seed[1] & _WORD) + zero, seed[0] & _WORD, (seed[0] >> 32) & _WORD)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    numbers = torch.stack(halves, -1).flatten(-2)[..., first % 8 : first % 8 + stop - first]
    return numbers >= threshold(dropout_p)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0, k1, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Philox-4x32 (Salmon et al., 2011): four random words for counters c and a key k, all words in int64 tensors."""
    for _ in range(rounds):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _multiply(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of words; in parts, as int64 holds no 64 bits without a sign."""
    high, low = by >> 16, by & 0xFFFF
    return (x * high + (x * low >> 16)) >> 16, (x * by) & _WORD
