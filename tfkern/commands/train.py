"""Train GPT, BERT, ViT or MLP-Mixer on your own text or images, or on built-in English and handwritten digits.

Writes a safetensors checkpoint at regular steps, at the end, and when interrupted. --resume continues from it bit for bit.
`tfkern generate` and `tfkern classify` use it. docs/training.md has examples.
"""

import contextlib
import os
import signal
import threading
from pathlib import Path

import torch

import tfkern
from tfkern.commands import train_arguments
from tfkern.commands.arguments import writable
from tfkern.commands.train_progress import Steps
from tfkern.ending import INTERRUPTED, InputError
from tfkern.extras import require
from tfkern.training import distributed, provenance
from tfkern.training.distributed import Ranks
from tfkern.training.tasks import Task
from tfkern.training.trainer import Training

add_arguments = train_arguments.add_arguments


def run(args) -> int:
    """Train to the end or until interrupted, and write the checkpoint. The exit status: 0, or 130 if interrupted."""
    require("safetensors", "demo")
    train_arguments.check(args)
    with distributed.joined(args.distributed) as (ranks, device), _only_the_first_prints(ranks):
        return _run(args, ranks, device)


def _run(args, ranks: Ranks, device: torch.device) -> int:
    path = args.out / f"{train_arguments.kind(args)}.safetensors"
    if not args.resume or args.out.exists():
        writable(args.out)
    with _locked(path) if ranks.first else contextlib.nullcontext():
        return _trained(args, path, ranks, device)


def _trained(args, path: Path, ranks: Ranks, device: torch.device) -> int:
    training = begun(args, path, ranks, device)
    if attention := provenance.backend(training):
        print(f"attention by {provenance.label(attention, device)}", flush=True)
    interrupted = threading.Event()
    with _signals_set(interrupted), Steps(training, quiet=not ranks.first) as steps:

        def report(training: Training) -> bool:
            steps.show(training)
            if len(training.losses) % args.save_every == 0:
                training.save(path)
            return ranks.any(interrupted.is_set(), device)

        training.run(on_step=report)
        training.save(path)
        stopped = ranks.any(interrupted.is_set(), device)
    print(f"checkpoint after step {len(training.losses)}: {path}")
    if stopped:
        print("interrupted; --resume goes on from there")
        return INTERRUPTED
    score = training.score()
    print(f"{score.name}: {score}")
    return 0


def begun(args, path: Path, ranks: Ranks, device: torch.device) -> Training:
    """A new training, or with --resume the one that its checkpoint at `path` holds."""
    if not args.resume:
        if path.exists():
            raise InputError(
                f"{path} exists and is not overwritten: --resume goes on from it; or remove it, or name another --out"
            )
        task, prepare = train_arguments.task(args)
        training = Training.start(task, tfkern.attention, None, args.seed or 0, device, ranks, prepare)
        count = sum(p.numel() for p in training.model.parameters())
        print(f"{task.name} with {count:,} parameters on {_what(task)}", flush=True)
        return training
    data = args.classify or args.data
    training = Training.load(path, tfkern.attention, device, train_arguments.kind(args), ranks, data)
    train_arguments.refuse_changes(args, path, training.recipe, training.model.config)
    print(f"going on after step {len(training.losses)} of {training.steps}", flush=True)
    return training


def _what(task: Task) -> str:
    """A description of the data: how much is trained on and held out, and where it is from."""
    own, where = task.data, task.data.source.path or "built-in data"
    if not hasattr(own, "classes"):
        return f"{len(own.train):,} tokens of {own.tokenizer.size:,} kinds, {len(own.held_out):,} more held out: {where}"
    examples = f"{len(own.train):,} examples of {len(own.classes)} classes, {len(own.held_out):,} more held out: {where}"
    cut = getattr(task, "cut", 0)
    return f"{examples}\n{cut:,} of them are longer than --context, {task.config.context} tokens, and cut" if cut else examples


@contextlib.contextmanager
def _locked(path: Path):
    """Lock a checkpoint within the block, so that no other training writes it. Raise InputError if another training does. The
    system releases the lock when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if not path.parent.exists():  # there is nothing to resume, which reading the checkpoint reports
        yield
        return
    beside = path.with_name(path.name + ".lock")
    with open(beside, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another training writes {path}: wait for its end, or name another --out") from None
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _only_the_first_prints(ranks: Ranks):
    """Discard standard output within the block, except in the first of several processes."""
    with open(os.devnull, "w") as nowhere, contextlib.nullcontext() if ranks.first else contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _signals_set(event: threading.Event):
    """Let an interrupt or a termination set the event within the block, so that no step or save is left half done. A second
    interrupt raises KeyboardInterrupt at once."""

    def stop(number: int, _) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
