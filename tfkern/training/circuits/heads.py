"""What each head of an attention-only transformer does, and which matrices make it do so.

Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021): a head's scores depend on the product W_Q W_K^T
alone, its QK circuit; what it writes depends on W_V W_O alone, its OV circuit. Vectors are rows here, as in the model. The
scores of heads: Olsson et al., "In-context Learning and Induction Heads" (2022). A function gives one figure a head,
(layers, H), or a matrix of the head that is named by its layer and number, both from 0.
"""

import copy
import math

import torch
from torch import Tensor

from tfkern import reference
from tfkern.models.attention_only import AttentionOnly
from tfkern.training.circuits.repeats import in_repeat

Head = tuple[int, int]  # layer, number


def patterns(model: AttentionOnly, ids: Tensor) -> Tensor:
    """Attention weights (layers, B, H, N, N) for ids (B, N), written out by tfkern.reference."""
    kept = []
    with torch.no_grad():
        x, positions = model.embedded(ids)
        for heads in model.layers:
            kept.append(reference.attention_weights(*heads.queries_and_keys(x, positions), is_causal=True)[0])
            x = x + heads(x, positions)
    return torch.stack(kept) if kept else x.new_zeros(0, len(ids), model.config.heads, ids.shape[1], ids.shape[1])


def after_the_same(ids: Tensor) -> Tensor:
    """(B, N, N) bool: True where the token before key j is the token of query i, and j <= i. An induction head looks there."""
    n = ids.shape[1]
    same = torch.zeros(len(ids), n, n, dtype=torch.bool, device=ids.device)
    same[:, :, 1:] = ids[:, :, None] == ids[:, None, :-1]
    return same & torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()


def prefix_matching(weights: Tensor, ids: Tensor, periods: Tensor) -> Tensor:
    """(layers, H) shares of attention that go to tokens after an earlier copy of the current one, from inside the repeat.

    weights (layers, B, H, N, N) of `patterns`, ids (B, N), periods (B,).
    """
    matched = (weights * after_the_same(ids)[:, None]).sum(-1)  # (layers, B, H, N)
    queries = in_repeat(ids, periods)
    return (matched * queries[:, None]).sum((1, 3)) / queries.sum()


def chance(ids: Tensor, periods: Tensor) -> float:
    """The prefix-matching score of a head that looks at all tokens alike."""
    n = ids.shape[1]
    alike = torch.ones(n, n, device=ids.device).tril() / torch.arange(1, n + 1, device=ids.device)[:, None]
    return prefix_matching(alike.expand(1, len(ids), 1, n, n), ids, periods).item()


def previous_token(weights: Tensor) -> Tensor:
    """(layers, H) shares of attention that go to the token before, over all queries that have one."""
    return weights.diagonal(-1, -2, -1).mean((1, 3))


def drawn(weights: Tensor, ids: Tensor, kinds: int) -> Tensor:
    """(layers, H, kinds): the attention that a token of each kind draws, summed over queries and averaged over its places.

    weights (layers, B, H, N, N) of `patterns`, ids (B, N).
    """
    by_key = weights.sum(-2).transpose(1, 2).flatten(2)  # (layers, H, B N)
    total = by_key.new_zeros(*by_key.shape[:2], kinds).index_add_(2, ids.flatten(), by_key)
    return total / torch.bincount(ids.flatten(), minlength=kinds).clamp_min(1)


def copying(model: AttentionOnly) -> Tensor:
    """(layers, H): the sum of the eigenvalues of a head's OV circuit over the sum of their sizes, from -1 to 1.

    1: whatever token is attended to, the head raises its own logit. 0: as random matrices do. Of W_E W_V W_O W_U, (V, V), the
    eigenvalues that are not 0 are those of W_O W_U W_E W_V, (D, D).
    """
    rows = []
    for heads in model.layers:
        small = (heads.W_O @ model.W_U @ model.W_E @ heads.W_V).detach().double()  # (H, D, D)
        eigenvalues = torch.linalg.eigvals(small)
        rows.append(eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1).clamp_min(1e-300))
    return torch.stack(rows).float() if rows else torch.zeros(0, model.config.heads)


def qk(model: AttentionOnly, head: Head) -> Tensor:
    """W_Q W_K^T / sqrt(D), (C, C): what the score of two vectors of the stream is made by."""
    W_Q, W_K = _weights(model, head, "W_Q", "W_K")
    return W_Q @ W_K.T / math.sqrt(W_Q.shape[1])


def ov(model: AttentionOnly, head: Head) -> Tensor:
    """W_V W_O, (C, C): what the head adds to the stream where it looks at a vector of the stream."""
    W_V, W_O = _weights(model, head, "W_V", "W_O")
    return W_V @ W_O


def token_qk(model: AttentionOnly, head: Head) -> Tensor:
    """(V, V) scores in nats: row a query's token, column a key's token, positions left out."""
    return (model.W_E @ qk(model, head) @ model.W_E.T).detach()


def position_qk(model: AttentionOnly, head: Head) -> Tensor:
    """(N, N) scores in nats: row a query's position, column a key's position, tokens left out."""
    return (model.W_P @ qk(model, head) @ model.W_P.T).detach()


def composed_qk(model: AttentionOnly, second: Head, first: Head) -> Tensor:
    """(V, V) scores in nats of K-composition: row a query's token, column the token that head `first` brought to the key."""
    return (model.W_E @ qk(model, second) @ (model.W_E @ ov(model, first)).T).detach()


def token_ov(model: AttentionOnly, head: Head) -> Tensor:
    """(V, V) logits in nats: row the token attended to, column the token predicted."""
    return (model.W_E @ ov(model, head) @ model.W_U).detach()


def composition(model: AttentionOnly, layer: int = 1, draws: int = 50) -> dict[str, Tensor]:
    """How much each head of `layer` reads what each head of the layer before wrote: by its queries, keys and values.

    (H, H) each, a row a head of `layer`: the norm of the product of both matrices over the product of their norms, less what
    random matrices of these sizes have (Elhage et al., "Composition scores").
    """
    if not 1 <= layer < model.config.layers:
        raise ValueError(f"layer must be from 1 to {model.config.layers - 1}, one that has a layer before it, but is {layer}")
    number = range(model.config.heads)
    reads, writes = [qk(model, (layer, h)) for h in number], [ov(model, (layer - 1, h)) for h in number]
    passes = [ov(model, (layer, h)) for h in number]
    baseline = _random_composition(model.config.width, model.config.width // model.config.heads, draws)

    def grid(product) -> Tensor:
        rows = [[product(h, g) for g in number] for h in number]
        return torch.tensor(rows) - baseline

    return {
        "Q": grid(lambda h, g: _share(writes[g], reads[h])),
        "K": grid(lambda h, g: _share(writes[g], reads[h].T)),
        "V": grid(lambda h, g: _share(writes[g], passes[h])),
    }


def without(model: AttentionOnly, head: Head) -> AttentionOnly:
    """A copy of the model whose head writes nothing."""
    layer, number = head
    _weights(model, head)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.layers[layer].W_O[number] = 0.0
    return copied


def _weights(model: AttentionOnly, head: Head, *names: str) -> list[Tensor]:
    layer, number = head
    if not (0 <= layer < model.config.layers and 0 <= number < model.config.heads):
        sizes = f"{model.config.layers} layers of {model.config.heads} heads"
        raise ValueError(f"head must be (layer, number), both from 0, of a model of {sizes}, but is {head}")
    return [getattr(model.layers[layer], name)[number] for name in names]


def _share(a: Tensor, b: Tensor) -> float:
    return ((a @ b).norm() / (a.norm() * b.norm())).item()  # (C, C) @ (C, C)


def _random_composition(width: int, head_dim: int, draws: int) -> float:
    """What `_share` gives for products of random (width, head_dim) and (head_dim, width) matrices, on average."""
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(draws, width, head_dim, generator=generator) for _ in range(4)]
    a, b = (x @ y.mT for x, y in zip(wide[:2], wide[2:], strict=True))  # (draws, width, width)
    return sum(map(_share, a, b)) / draws
