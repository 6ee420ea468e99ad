"""Text from a causal language model, token by token: sampling, and the cache of keys and values.

A model here takes (ids, cache, last) as GPT.forward does, and has `config.context` and `blocks`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tfkern.nn import KeyValueCache


def generate(
    model: nn.Module, ids: Tensor, count: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    generator: torch.Generator | None = None, cache: bool = True, stop: int | None = None,
) -> Tensor:  # fmt: skip
    """The prompts and at most `count` tokens after each: (B, N + count), fewer where all rows have stopped, from ids (B, N).
    The arguments and errors of `stream`."""
    return torch.cat([ids, *stream(model, ids, count, temperature, top_k, top_p, generator, cache, stop)], 1)


def stream(
    model: nn.Module, ids: Tensor, count: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    generator: torch.Generator | None = None, cache: bool = True, stop: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """At most `count` tokens after each prompt, as they come.

    A model sees at most `context` tokens. Of a longer prompt it sees the newest `context`. Whenever tokens then exceed the
    context, the older half of them leaves, and positions count anew from the first one that stays.

    With a cache, each token passes through the model once, and a second time at each move of the window, when the half that
    stays gets new positions: at most two tokens of work for each token that comes, however long the text. Without a cache,
    all tokens of the window pass each time. The windows are the same, so the tokens are the same, except where rounding
    decides between two equally likely ones: a product of one row may be rounded otherwise than that of many.

    Args:
        model: a GPT or Llama; in eval mode, unless dropout is wanted.
        ids: (B, N) int64, N >= 1: prompts of one length.
        count: how many tokens to make.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens, and those as likely as the k-th. None is all.
        top_p: sample among the fewest likeliest tokens whose probabilities sum to at least p, 0 < p <= 1. Probabilities are
            those after temperature and top_k. None is all.
        generator: of the random numbers, on the device of the model; None is torch's own.
        cache: whether keys and values are kept.
        stop: the token that ends a text. A row that has it goes on with it; when all rows have it, no more come.

    Yields: (B, 1) int64, at most `count` times.

    Raises: ValueError for an argument out of range.

    Source: nucleus sampling (top_p) by Holtzman et al. (2020), top_k by Fan et al. (2018). The order, temperature, top_k,
        top_p, is that of transformers.
    """
    _check(ids, count, temperature, top_k, top_p)
    return _stream(model, ids, count, (temperature, top_k, top_p, generator), cache, stop)


@torch.no_grad()
def _stream(model: nn.Module, ids: Tensor, count: int, sampling: tuple, cache: bool, stop: int | None) -> Iterator[Tensor]:
    context = model.config.context
    seen = ids[:, -context:]  # the window
    room = min(context, seen.shape[1] + count)
    kept = [KeyValueCache(room) for _ in model.blocks] if cache else None
    ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for _ in range(count):
        if seen.shape[1] > context:
            seen = seen[:, -(seen.shape[1] // 2) :]
            for layer in kept or ():
                layer.clear()
        new = seen[:, kept[0].length :] if kept else seen
        chosen = choose(model(new, kept, last=True)[:, -1], *sampling)
        if stop is not None:
            chosen = chosen.masked_fill(ended, stop)
            ended |= chosen == stop
        yield chosen
        if stop is not None and ended.all():
            return
        seen = torch.cat([seen, chosen], 1)


def choose(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """One token for each row of logits (B, vocab_size): (B, 1) int64. The other arguments as in `stream`, unchecked."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1, generator=generator)


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """How likely each token is drawn: logits (B, vocab_size) -> (B, vocab_size) float64. Rows need not sum to 1.

    temperature > 0; the arguments as in `stream`, unchecked.
    """
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    below = (logits - logits.amax(-1, keepdim=True)).double()  # at most 0, which the lowest temperature leaves finite
    shares = torch.softmax(below / temperature, -1)
    if top_p is None:
        return shares
    falling, order = shares.sort(dim=-1, descending=True, stable=True)
    before = falling.cumsum(-1) - falling  # the sum of all likelier ones; 0 for the likeliest, which therefore stays
    return shares.scatter(-1, order, falling.masked_fill(before >= top_p, 0.0))


def _check(ids: Tensor, count: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if ids.dim() != 2 or ids.shape[1] < 1 or ids.is_floating_point():
        raise ValueError(f"ids must be integers (B, N) with N >= 1, but are {ids.dtype} {tuple(ids.shape)}; give a first token")
    if count < 0:
        raise ValueError(f"count must be 0 or more, but is {count}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more and finite, but is {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, or None, but is {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, or None, but is {top_p}")
