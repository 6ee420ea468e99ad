"""Looking into a trained classifier: where its heads attend, and what a sentence becomes when one word can't see another."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tfkern.models.ladder.e_softmax import weights
from tfkern.models.ladder.sentiment import Sentiment, encode


@contextlib.contextmanager
def attending_by(layer: nn.Module, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within the block, make(attention) is used in place of the attention of every rung in `layer` that has one."""
    changed = [(m, m.attention) for m in layer.modules() if hasattr(m, "attention")]
    for module, attention in changed:
        module.attention = make(attention)
    try:
        yield
    finally:
        for module, attention in changed:
            module.attention = attention


@torch.no_grad()
def maps(model: Sentiment, text: str) -> Tensor:
    """(H, N, N): the softmax weights of each head of a rung over a sentence; row i is the token that attends."""
    found = []

    def looking(attention):
        def attend(query, key, value, *, dropout_p=0.0, **options):
            found.append(weights(query, key, attention, **options)[0])
            return attention(query, key, value, **options)

        return attend

    with attending_by(model.layer, looking):
        model.logits([text])
    return found[0]


@torch.no_grad()
def contributions(model: Sentiment, text: str) -> Tensor:
    """(N,): what each word adds to the logit of a sentence."""
    return model.eval().contributions(*encode([text]))[0]


@torch.no_grad()
def logit_hiding(model: Sentiment, text: str, pairs: list[tuple[str, str]]) -> float:
    """The logit of a sentence whose words can't see one another: (query, key) hides the word key from the word query.

    The words must be in the sentence, which must be given to a rung with softmax; ValueError otherwise."""
    words = text.split()
    if missing := sorted({w for pair in pairs for w in pair} - set(words)):
        raise ValueError(f"pairs must be of words in {text!r}, but have {missing}; leave them out")
    if not any(hasattr(m, "attention") for m in model.layer.modules()):
        raise ValueError(f"model must have a layer with softmax, from rung e on, but has {type(model.layer).__name__}")
    seen = torch.ones(len(words), len(words), dtype=torch.bool)
    for query, key in pairs:
        seen[words.index(query), words.index(key)] = False

    def hiding(attention):
        return lambda query, key, value, **options: attention(query, key, value, attn_mask=seen, **options)

    with attending_by(model.layer, hiding):
        return model.logits([text]).item()
