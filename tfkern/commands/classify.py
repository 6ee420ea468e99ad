"""Tell the class of images or sentences with a model that `tfkern train vit`, `mixer` or `bert --classify` trained."""

import sys
from pathlib import Path

import torch

import tfkern
from tfkern.commands.arguments import number
from tfkern.extras import require
from tfkern.training import provenance, telling
from tfkern.training.trained import Trained


def add_arguments(parser) -> None:
    parser.add_argument("checkpoint", type=Path, help="such as tfkern-out/vit.safetensors")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image files; for a BERT classifier sentences, each quoted")
    parser.add_argument("--top", type=number(int, 1), default=3, help="how many classes to tell (default: 3)")


def run(args) -> int:
    """Print the likeliest classes of each input with their probabilities, the likeliest first. Return the exit status 0."""
    require("safetensors", "demo")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = Trained.read(args.checkpoint, tfkern.attention, device, ("vit", "mixer", "bert-classifier"))
    shares = telling.probabilities(trained, args.inputs)
    by = provenance.of_trained(args.checkpoint, trained, lambda: telling.probabilities(trained, args.inputs[:1]))
    print(f"{by}:", file=sys.stderr, flush=True)
    for name, row in zip(args.inputs, shares, strict=True):
        best = row.topk(min(args.top, len(row)))
        told = ", ".join(f"{trained.form.classes[i]} {p:.1%}" for p, i in zip(*best, strict=True))
        print(f"{name}: {told}")
    return 0
