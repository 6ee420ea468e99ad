"""The measurements of the ladder: why 1/√D, why softmax, what each rung learns, whether heads overfit, how large a block is."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import tfkern
from tfkern.models import ladder
from tfkern.models.bert import BERT
from tfkern.models.gpt import GPT
from tfkern.models.ladder import sentences
from tfkern.models.ladder.e_softmax import weights
from tfkern.models.ladder.sentiment import Fit, Sentiment, judged, train
from tfkern.models.vit import ViT

HEAD_DIMS = (8, 16, 32, 64, 128, 256, 512)
TOKENS = 64
SCALES: dict[str, Callable[[int, int], float]] = {
    "1": lambda d, t: 1.0, "1/√D": lambda d, t: d**-0.5, "1/D": lambda d, t: 1 / d, "1/T": lambda d, t: 1 / t,
}  # fmt: skip
WIDTH, HEADS = 16, 4  # of the classifiers of sentences

PLAIN = f"plain PyTorch {torch.__version__}"


def backend() -> str:
    """What computes the rungs with softmax here, in words: "tfkern's backend cpu, torch 2.13.0"."""
    q = torch.zeros(1, HEADS, 5, WIDTH // HEADS)
    return f"tfkern's backend {tfkern.explain(q, q, q).split()[0]}, torch {torch.__version__}"


@dataclass(frozen=True)
class Deviation:
    """Standard deviations with one scale at one head dim: of the scores, of the output of rung d and of that of rung e. And of
    rung e the mean largest weight of a row, and how much gradient comes through: norm of the scores' over norm of the output's.
    """

    head_dim: int
    scale: str
    scores: float
    summed: float
    averaged: float
    largest: float
    gradient: float


@functools.cache
def deviations(head_dims: Sequence[int] = HEAD_DIMS, draws: int = 16, seed: int = 0) -> list[Deviation]:
    """For x (TOKENS, D) of standard deviation 1 and weights that keep it, drawn `draws` times, the same for each scale."""
    return [_deviation(d, name, draws, seed) for d, name in itertools.product(head_dims, SCALES)]


def _deviation(d: int, name: str, draws: int, seed: int) -> Deviation:
    found = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for _ in range(draws):
            before = ladder.QueriesKeysValues(d, SCALES[name](d, TOKENS))
            layer = ladder.SoftmaxAttention(d, before.scale)
            layer.load_state_dict(before.state_dict())
            x, do = torch.randn(2, 1, TOKENS, d)
            q, k = (linear(x)[:, None] for linear in (layer.query, layer.key))
            p = weights(q, k, scale=layer.scale)[:, 0]  # (1, T, T)
            dp = do @ layer.value(x).mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            outputs = before.scores(x), before(x), layer(x)
            squares = [o.square().mean() for o in outputs]
            found.append(torch.stack([*squares, p.amax(-1).mean(), (ds.norm() / do.norm())]))
    mean = torch.stack(found).mean(0)
    return Deviation(d, name, *mean[:3].sqrt().tolist(), *mean[3:].tolist())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "each token": lambda: ladder.EachToken(WIDTH),
    "a": ladder.Products,
    "b": lambda: ladder.InnerProduct(WIDTH),
    "c": lambda: ladder.Values(WIDTH),
    "d": lambda: ladder.QueriesKeysValues(WIDTH),
    "e": lambda: ladder.SoftmaxAttention(WIDTH),
    "f": lambda: ladder.Head(WIDTH, WIDTH // HEADS),
    "g": lambda: ladder.Heads(WIDTH, HEADS),
    "h": lambda: ladder.Block(WIDTH, HEADS),
    "f, full width": lambda: ladder.Head(WIDTH, WIDTH),
    "g, dropout": lambda: ladder.Heads(WIDTH, HEADS, dropout=0.2),
}


def trained(name: str, seed: int, **options) -> tuple[Sentiment, Fit]:
    """A classifier with the layer of that name, trained from that seed on the sentences. options as of `train`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sentiment(LAYERS[name](), WIDTH, WIDTH // HEADS if name == "f" else WIDTH)
        return model, train(model, **options)


@dataclass(frozen=True)
class Learned:
    """Means over seeds (and the standard deviation of held_out_right over them) of a Fit; parameters of the layer alone."""

    name: str
    parameters: int
    loss: float
    right: float
    held_out_loss: float
    held_out_right: float
    deviation: float


def learned(name: str, fits: Sequence[Fit]) -> Learned:
    """What a layer of that name learned from several seeds."""
    means = [torch.tensor([getattr(f, what) for f in fits]) for what in ("loss", "right", "held_out_loss", "held_out_right")]
    deviation = means[-1].std(unbiased=False).item()
    return Learned(name, sum(p.numel() for p in LAYERS[name]().parameters()), *(m.mean().item() for m in means), deviation)


@functools.cache  # tables and pictures ask for the same
def overfitting(name: str, seeds: int, weight_decay: float) -> tuple[Learned, tuple[float, float]]:
    """A layer alone, and the ensemble of its seeds: (held-out loss, held-out share right) of the mean of their logits."""
    fits = [trained(name, seed, weight_decay=weight_decay)[1] for seed in range(seeds)]
    together = torch.stack([f.held_out_logits for f in fits]).mean(0)
    return learned(name, fits), judged(together, sentences.HELD_OUT[1])


def counts() -> dict[str, int]:
    """Parameters of the block at width 768 and of the models that are made of twelve, counted on the meta device."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        block, bert, gpt, vit = ladder.Block(768, 12), BERT(), GPT(), ViT()
    embeddings = [bert.tokens, bert.positions, bert.segments, bert.norm]
    return {
        "queries, keys, values": count(block.attn.qkv),
        "projection": count(block.attn.proj),
        "MLP": count(block.mlp),
        "two norms": count(block.norm_1) + count(block.norm_2),
        "block": count(block),
        "twelve blocks": count(bert.blocks),
        "BERT-base, embeddings": sum(count(part) for part in embeddings),
        "BERT-base, pooler": count(bert.pooler),
        "BERT-base": count(bert),
        "GPT-2 small, embeddings": count(gpt.tokens) + count(gpt.positions),
        "GPT-2 small": count(gpt),
        "ViT-B/16, patches and positions": count(vit.embed) + vit.positions.numel() + vit.class_token.numel(),
        "ViT-B/16": count(vit),
    }
