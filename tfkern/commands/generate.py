"""Continue a text with the GPT that `tfkern train gpt` trained."""

from pathlib import Path

import torch

import tfkern
from tfkern.extras import require
from tfkern.training import sampling
from tfkern.training.trainer import CheckpointError, Training


def add_arguments(parser) -> None:
    parser.add_argument("prompt", nargs="?", default="The ")
    parser.add_argument("--checkpoint", type=Path, default=Path("tfkern-out/gpt.safetensors"))
    parser.add_argument("--count", type=int, default=400, help="characters to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest character")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--seed", type=int, default=0)


def run(args) -> int:
    """Print the prompt and what the model makes of it."""
    require("safetensors", "demo")
    if not args.prompt:
        raise ValueError("the prompt must have at least one character")
    if args.count < 0 or args.temperature < 0 or (args.top_k is not None and args.top_k < 1):
        raise ValueError("--count and --temperature must be 0 or more, --top-k 1 or more")
    training = Training.load(args.checkpoint, tfkern.attention, "cuda" if torch.cuda.is_available() else "cpu")
    if training.task.name != "gpt":
        raise CheckpointError(
            f"{args.checkpoint} is of {training.task.name}, but text comes from gpt; train one with `tfkern train gpt`"
        )
    print(sampling.continued(training, args.prompt, args.count, args.temperature, args.top_k, args.seed))
    return 0
