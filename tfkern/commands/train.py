"""Train a small reference model: gpt and bert on English text, vit on handwritten digits.

Writes a safetensors checkpoint as it goes, and when interrupted; --resume goes on from it bit for bit.
"""

import contextlib
import signal
import threading
from pathlib import Path

import torch

import tfkern
from tfkern.commands.arguments import SEED, number, writable
from tfkern.ending import INTERRUPTED, InputError
from tfkern.extras import require
from tfkern.training import provenance
from tfkern.training.tasks import TASKS
from tfkern.training.trainer import Training


def add_arguments(parser) -> None:
    steps = number(int, 1)
    parser.add_argument("model", choices=list(TASKS))
    parser.add_argument("--steps", type=steps, help="how many updates in all (default: the model's own number)")
    parser.add_argument("--out", type=Path, default=Path("tfkern-out"), help="folder of the checkpoint MODEL.safetensors")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--save-every", type=steps, default=50, metavar="STEPS")


def run(args) -> int:
    """Train to the end, or until interrupted; the checkpoint is there either way."""
    require("safetensors", "demo")
    path = args.out / f"{args.model}.safetensors"
    training = begun(args, path)
    print(f"attention by {provenance.label(provenance.backend(training), training.device)}", flush=True)
    interrupted = threading.Event()

    def report(training: Training) -> bool:
        done = len(training.losses)
        if done % args.save_every == 0:
            training.save(path)
        if done % 10 == 0 or done == training.steps:
            print(f"step {done:5} of {training.steps}  loss {training.losses[-1]:.4f}", flush=True)
        return interrupted.is_set()

    with _signals_set(interrupted):
        training.run(on_step=report)
        training.save(path)
    print(f"checkpoint after step {len(training.losses)}: {path}")
    if interrupted.is_set():
        print("interrupted; --resume goes on from there")
        return INTERRUPTED
    score = training.score()
    print(f"{score.name}: {score}")
    return 0


def begun(args, path: Path) -> Training:
    """A training from its start, or from where its checkpoint is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.resume:
        writable(args.out)
        if path.exists():
            raise InputError(
                f"{path} exists and is not overwritten: --resume goes on from it; or remove it, or name another --out"
            )
        return Training.start(TASKS[args.model], tfkern.attention, args.steps, args.seed, device)
    training = Training.load(path, tfkern.attention, device, args.model)
    if args.steps not in (None, training.steps):
        raise InputError(
            f"{path} is of a training of {training.steps} steps, on which its learning rates depend; "
            f"--steps {args.steps} does not fit: leave it out, or train anew into another --out"
        )
    writable(args.out)
    print(f"going on after step {len(training.losses)} of {training.steps}")
    return training


@contextlib.contextmanager
def _signals_set(event: threading.Event):
    """Within the block an interrupt or a termination sets the event: a step is never left half done, nor a save."""
    before = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
