"""Continue a text with a GPT that `tfkern train gpt` or `tfkern demo` trained."""

import sys
from pathlib import Path

import torch

import tfkern
from tfkern.commands.arguments import SEED, number
from tfkern.commands.demo import CHECKPOINT
from tfkern.ending import InputError
from tfkern.extras import require
from tfkern.training import provenance, sampling
from tfkern.training.checkpoints import CheckpointError
from tfkern.training.trained import Trained

DEFAULTS = (Path("tfkern-out/gpt.safetensors"), CHECKPOINT)


def add_arguments(parser) -> None:
    parser.add_argument("prompt", nargs="?", default="The ")
    where = " or ".join(map(str, DEFAULTS))
    parser.add_argument("--checkpoint", type=Path, help=f"default: {where}, the first that is there")
    parser.add_argument("--count", type=number(int, 0), default=400, help="tokens to write")
    parser.add_argument("--temperature", type=number(float, 0.0), default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=number(int, 1), help="choose among so many of the likeliest")
    parser.add_argument(
        "--top-p", type=number(float, 1e-9, 1.0), help="choose among the likeliest that together have this probability"
    )
    parser.add_argument("--seed", type=SEED, default=0)


def run(args) -> int:
    """Print the prompt, and the model's continuation as it is generated. Return the exit status 0."""
    require("safetensors", "demo")
    if not args.prompt:
        raise InputError("the prompt must have at least one character")
    path = args.checkpoint or next((path for path in DEFAULTS if path.exists()), None)
    if path is None:
        raise CheckpointError(
            f"there is no checkpoint {' or '.join(map(str, DEFAULTS))}; "
            "`tfkern train gpt` or `tfkern demo` writes one, or name one with --checkpoint"
        )
    trained = Trained.read(path, tfkern.attention, "cuda" if torch.cuda.is_available() else "cpu", ("gpt",))
    tokenizer = trained.form.tokenizer
    ids = tokenizer.encode(args.prompt)  # raises an error if the model does not know a character
    if not ids:
        raise InputError(f"the prompt must have a token or more, but {args.prompt!r} has none")
    seen = torch.tensor([ids[-trained.form.config.context :]], device=trained.device)
    by = provenance.of_trained(path, trained, lambda: trained.model(seen))
    print(f"{by}:", file=sys.stderr, flush=True)
    print(args.prompt, end="", flush=True)
    pieces = sampling.continuing(
        trained.model, tokenizer, args.prompt, args.count, args.temperature, args.top_k, args.top_p, args.seed
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
